tune run --nproc_per_node 2 lora_finetune_distributed --config torchtune/lora_single_device.yaml batch_size=4 optimizer.lr=1e-4
