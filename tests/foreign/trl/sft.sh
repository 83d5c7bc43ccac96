trl sft \
    --model_name_or_path org/tiny-chat-7b \
    --dataset_name org/talks \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 --packing \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
    --eval_strategy steps --eval_steps 100 \
    --use_peft --lora_r 32 --lora_alpha 16 \
    --output_dir runs/talks --push_to_hub
