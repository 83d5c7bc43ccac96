trl grpo --model_name_or_path org/tiny-chat-7b --dataset_name org/sums --reward_funcs rewards.right_answer \
    --num_generations 4 --max_completion_length 64 --temperature 0.9 --use_vllm --output_dir runs/grpo
