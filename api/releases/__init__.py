"""New versions: exported by a child, tried, made live; others kept beside the live one."""
