# A requirements file with hashes in; out the same without torch and what only its CUDA build needs.
/^[a-z0-9]/ { drop = /^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ }
!drop
