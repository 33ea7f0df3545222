"""Groups of files: which blocks they occupy, copied as one batch in disk order, and files back from them."""
