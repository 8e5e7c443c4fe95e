"""The benchmarks, one file for each thing that has a format of its own.

    questions --generate--> answers --judge--> judgments --alpaca, mtbench, arena--> figures
                            answers --verify--> figures, where an answer is right or wrong by itself

generate, judge, alpaca, mtbench, arena and verify are commands (`python eval.py NAME`), each a function main(argv).
They share formats.py (question and answer files), judgments.py (judgment files), replies.py (replies on disk as they
come) and endpoint.py (a judge behind an address). docs/benchmarks.md says how to use them.
"""
