"""Tasks, engines, contexts, the loop. Ray enters in `contexts` and `launch`, DeepSpeed in `engine_deepspeed`."""
