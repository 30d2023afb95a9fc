"""The experiment for one GPU: does the compensated cut of a deeper encoder pay after millions of tokens, and how much.

    python -m experiments.gpu_quality --out results --teacher FOLDER          # about 25 minutes of one H100
    python -m experiments.gpu_quality --out tried --scale 0.01                # the same at a hundredth, on a CPU

Five arms at half and a quarter of the teacher's width, from one corrected teacher, on the harness of
experiments/quality: same jobs, workers and kept results, so that an interrupted command continues.
"""
