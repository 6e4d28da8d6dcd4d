"""The gated delta rule: reference, chunked computation, gate, public functions."""
