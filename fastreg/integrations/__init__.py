"""Callbacks for training libraries, one module each: neither library is needed by the rest of fastreg."""
