trl kto --model_name_or_path org/tiny-chat-7b --dataset_name org/thumbs --desirable_weight 1.5 --beta 0.2 \
    --load_in_4bit --use_peft --lora_target_modules all-linear --warmup_ratio 0.1 --logging_steps 25 --output_dir runs/kto
