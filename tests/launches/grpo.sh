# A launch as veRL's own examples are: the engine is the first argument, the rest are overrides.
set -x
ENGINE=${1:-vllm}
if [ "$ENGINE" = "vllm" ]; then
    export VLLM_USE_V1=1
fi
gsm8k_train_path=$HOME/data/gsm8k/train.parquet
gsm8k_test_path=$HOME/data/gsm8k/test.parquet
math_train_path=$HOME/data/math/train.parquet
train_files="['$gsm8k_train_path', '$math_train_path']"
test_files="['$gsm8k_test_path']"
common_params=(
    algorithm.adv_estimator=grpo
    data.train_batch_size=1024
    data.max_prompt_length=512   # tokens
    data.max_response_length=1024
    data.filter_overlong_prompts=True
    "data.train_files=$train_files"
    "data.val_files=$test_files"
)
common_params+=(data.truncation='error')

for gpus in 8; do
    echo "on $gpus GPUs" >&2
done

python3 -m verl.trainer.main_ppo --config-path=config --config-name='ppo_trainer' \
    "${common_params[@]}" \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.rollout.name=$ENGINE \
    actor_rollout_ref.rollout.n=5 \
    algorithm.use_kl_in_reward=False \
    trainer.critic_warmup=0 \
    trainer.logger='["console","wandb"]' \
    trainer.project_name='verl_grpo_example_gsm8k' \
    trainer.experiment_name='qwen2_5_3b_function_rm' \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.save_freq=20 \
    trainer.test_freq=5 \
    trainer.total_epochs=15 $@
