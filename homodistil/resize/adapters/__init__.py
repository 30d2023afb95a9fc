"""One adapter a DeepSpeed optimizer wrapper: the only code that knows DeepSpeed's private bookkeeping.

    adapter.py        what everybody else sees: groups of fp32 masters with their state, and which elements lie where
    plain.py          stage 0, fp32 (torch's optimizer itself) and FP16_UnfusedOptimizer (bf16, fp16)
    flat_adapter.py   parameters end to end in flat buffers, shared by:
      fused.py        FP16_Optimizer, stage 0 with a fused Adam
      bf16.py         BF16_Optimizer, stage 1 with gradients summed in fp32
      zero.py         DeepSpeedZeroOptimizer, stages 1 and 2; offload.py with masters in host memory
    zero3.py          DeepSpeedZeroOptimizer_Stage3, with and without offload; zero3_check.py checks what it keeps

`homodistil/resize/support.py` chooses.
"""
