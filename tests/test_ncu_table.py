"""benchmarks/ncu_table.py: a line a launch, also where ncu talks before its table."""

from benchmarks.ncu_table import table

REPORT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","rows_kernel<float, 1>(Arguments)","dram","%","91.2"
"0","7","rows_kernel<float, 1>(Arguments)","time","us","3.1"
"1","7","gradients_kernel(Arguments)","dram","%","88.0"
"""


def test_a_line_a_launch():
    assert table(REPORT).splitlines() == [
        "| kernel | dram | time |",
        "| --- | --- | --- |",
        "| rows_kernel<float, 1> | 91.2 % | 3.1 us |",
        "| gradients_kernel | 88.0 % |  |",
    ]


def test_nothing_profiled():
    assert table("no GPU\n").splitlines() == ["| kernel |", "| --- |"]
