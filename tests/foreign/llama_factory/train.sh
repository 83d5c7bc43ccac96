#!/bin/bash
# two cards
export NCCL_DEBUG=WARN
CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 src/train.py \
    --stage sft --do_train True \
    --model_name_or_path org/tiny-chat-7b \
    --dataset greetings,more --template llama3 \
    --finetuning_type lora --lora_target q_proj,v_proj \
    --output_dir saves/shell --overwrite_output_dir \
    --per_device_train_batch_size 4 --learning_rate 5e-5 --num_train_epochs 3.0 --fp16
