"""One file = one method = one paper. Files register themselves; nothing here needs editing to add one."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
