python trl/scripts/reward.py --model_name_or_path org/tiny-chat-7b --dataset_name org/pairs --output_dir runs/reward \
    --per_device_train_batch_size 8 --gradient_checkpointing True --max_length 512 --center_rewards_coefficient 0.01
