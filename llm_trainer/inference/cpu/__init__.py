"""Faster decoding of a few sequences, above all of one sequence on a CPU.

What: one decoding step multiplies a single row with every weight, so that it takes as long as reading all
weights, plus the overhead of many small operations. The modules here do the same arithmetic with fewer and
larger operations (`fused_decoder`), with the fastest product of a matrix and a vector (`matvec`), and with a
search that reads the output matrix in eight bits and computes only the few logits that matter exactly
(`lm_head`, `int8_candidates`).

Why: on two cores, with 56 M parameters, a token takes 6.3 ms in fp32 and 4.8 ms in bf16 (compiled: 5.2 and
3.8), where `transformers.generate` takes 7.9 and 7.6 ms and reading the weights alone takes 3.9 and 2.5 ms
(docs/explanation/decisions.md, "what bounds decoding of one sequence"; benchmarks/decoding.py measures it).

Checks: tests/inference/cpu/ compares every module with the plain path, and tests/inference/test_engine.py
compares generated ids with those of a model without cache.

Switch: with LLM_TRAINER_CPU_DECODER=0 in the environment, generation runs the model as it is
(`model_runner.EagerModelRunner` and the model's own head), and nothing in this package is used.
"""
