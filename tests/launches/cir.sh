#!/bin/bash
# Code-integrated RL of a base model on one node. Stage 1 of 3: two calls per response.
set -x
ulimit -n 65535
export PYTHONUNBUFFERED=1
export HYDRA_FULL_ERROR=1
export VLLM_ATTENTION_BACKEND=XFORMERS
export RAY_DEBUG=legacy
unset ROCR_VISIBLE_DEVICES
source /opt/conda/bin/activate verl 2>/dev/null || true

MODEL_PATH=/mnt/models/Qwen2.5-Math-7B
CALLS=2
while [[ $# -gt 0 ]]; do
    case "$1" in
        --model)
            MODEL_PATH="$2"
            shift 2
            ;;
        --calls) CALLS="$2"; shift 2 ;;
        *)
            break
            ;;
    esac
done

project_name='cir'
exp_name="qwen2.5-math-7b-calls${CALLS}-$(date +%m%d_%H%M)"
max_prompt_length=1024
max_response_length=$((1024 * 4))
train_files="['data/still3/train.parquet']"
val_files="['data/aime24.parquet', 'data/aime25.parquet']"
ckpts="checkpoints/${project_name}/${exp_name}"
mkdir -p "$ckpts" logs

if [ ! -f data/still3/train.parquet ]; then
    echo "make the data first" >&2
    exit 1
fi

cat > runtime_env.yaml <<YAML
working_dir: ./
excludes: ["/.git/"]
env_vars:
  TORCH_NCCL_AVOID_RECORD_STREAMS: "1"
YAML

ray stop --force
ray start --head --node-ip-address 0.0.0.0 --num-gpus 8 --dashboard-host=0.0.0.0

ray job submit --address="http://127.0.0.1:8265" \
    --runtime-env-json='{"working_dir": "./", "env_vars": {"A": "b=c"}}' \
    -- python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=reinforce_plus_plus_baseline \
    algorithm.kl_ctrl.kl_coef=0.0 \
    data.train_files="$train_files" \
    data.val_files="$val_files" \
    data.train_batch_size=128 \
    data.val_batch_size=512 \
    data.shuffle=True \
    +data.seed=42 \
    data.max_prompt_length=${max_prompt_length} \
    data.max_response_length=${max_response_length} \
    data.truncation='left' \
    data.return_raw_chat=True \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$(( (max_prompt_length + max_response_length) * 2 )) \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.entropy_coeff=0.0 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.state_masking=True \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 \
    actor_rollout_ref.actor.fsdp_config.param_offload=False \
    +actor_rollout_ref.actor.fsdp_config.grad_offload=False \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.top_p=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.75 \
    actor_rollout_ref.rollout.max_model_len=15361 \
    actor_rollout_ref.rollout.max_num_batched_tokens=15361 \
    actor_rollout_ref.rollout.enforce_eager=False \
    actor_rollout_ref.rollout.n=16 \
    +actor_rollout_ref.rollout.generate_method=CIR \
    +actor_rollout_ref.rollout.max_call_time=$CALLS \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.n=16 \
    actor_rollout_ref.ref.log_prob_micro_batch_size=16 \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    reward_model.enable=False \
    reward_model.reward_manager=still_code_format \
    trainer.critic_warmup=0 \
    trainer.logger="['console','wandb']" \
    trainer.project_name=$project_name \
    trainer.experiment_name=$exp_name \
    trainer.default_local_dir="$ckpts" \
    trainer.val_before_train=True \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.save_freq=10 \
    trainer.test_freq=10 \
    trainer.total_epochs=30 \
    "${@:1}" 2>&1 | tee "logs/${exp_name}.log"
