"""What is known without a GPU: launches and bytes are counted, machine code is read, limits are computed."""
