"""One file = one method = one paper, in folders by where they act. Files register themselves; nothing here needs
editing to add one."""

from importlib import import_module
from pkgutil import walk_packages

for _file in walk_packages(__path__, f"{__name__}."):
    import_module(_file.name)
