"""One adapter per DeepSpeed optimizer wrapper: the only code that accesses DeepSpeed's private fields.

    adapter.py        common interface: groups of fp32 masters with their state, and the elements that each holds
    plain.py          stage 0, fp32 (the torch optimizer itself) and FP16_UnfusedOptimizer (bf16, fp16)
    flat_adapter.py   parameters end to end in flat buffers, base class of:
      fused.py        FP16_Optimizer, stage 0 with a fused Adam
      bf16.py         BF16_Optimizer, stage 1 with gradients summed in fp32
      zero.py         DeepSpeedZeroOptimizer, stages 1 and 2; offload.py with masters in host memory
    zero3.py          DeepSpeedZeroOptimizer_Stage3, with and without offload; zero3_check.py checks its fields

`homodistil/resize/support.py` chooses the adapter of an engine.
"""
