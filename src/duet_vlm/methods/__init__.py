"""One module per method, one method per paper. Modules register themselves: a new file needs no edit here."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
