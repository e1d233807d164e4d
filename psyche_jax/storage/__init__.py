"""Files that are whole or absent, on disks and in buckets; the hub; the lock of a run."""
