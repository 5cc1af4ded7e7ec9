"""One file = one method = one paper. Files register themselves; nothing here needs editing to add one."""
