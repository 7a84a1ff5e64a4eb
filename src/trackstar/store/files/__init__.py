"""Files of an index on local disks and other file systems: places, durable writes, reading ahead."""
