"""Callbacks for training libraries, one module each. The rest of fastreg needs neither library."""
