"""What users wrote down: which repository, volumes and groups there are; one module a format of such files."""
