"""The faults that a worker has to survive, or to end from: driven and measured from outside.

One function per fault drives it and returns what it measured. `test_fault_matrix.py` asserts each
claim; `make faults` prints the table, with `vllm serve` beside ours.
"""
