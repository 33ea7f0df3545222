"""ext2, ext3 and ext4, offline: the bitmaps that say which clusters are in use, and when they can be believed."""
