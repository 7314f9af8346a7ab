"""One hospital: reads its images, perturbs them where they lie, and can restore every one."""
