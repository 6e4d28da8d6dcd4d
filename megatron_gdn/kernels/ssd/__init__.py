"""Mamba2's state-space duality: reference, chunked computation, public function."""
