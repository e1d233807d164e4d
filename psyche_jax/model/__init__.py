"""Qwen2, Qwen3 and Llama 3 in Flax NNX, and what one does with it.

Read `qwen2` first: the model, whole sequences and single steps, over `attention`. `sharding` says where its arrays go
on the mesh, `decode` samples from it, `log_probs` scores what is there. `config` reads `config.json`, `huggingface` the
weights and tokenizer beside it. `kernels` chooses the attention of a device, `products` the precision of products and
the gradient that CPUs compute fastest, `flops` counts. `template_trial` renders a chat template within limits.
"""
