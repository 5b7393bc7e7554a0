"""fvd: virtual disks that grow on raw storage."""
