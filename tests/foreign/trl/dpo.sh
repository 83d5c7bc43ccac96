accelerate launch --config_file configs/zero3.yaml --num_processes 4 trl/scripts/dpo.py \
    --dataset_name org/pairs --dataset_streaming \
    --model_name_or_path org/tiny-chat-7b --dtype bfloat16 \
    --learning_rate 5.0e-7 --beta 0.05 --loss_type sigmoid \
    --max_steps 200 --no_remove_unused_columns --output_dir runs/pairs --report_to tensorboard
