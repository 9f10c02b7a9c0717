#!/usr/bin/env bash
# Tool-integrated RL: GRPO, one on-policy update a step, code asked for by a stop word.
set -e
ROOT=${ROOT:-$HOME/torl}
policy_path=${1:-$ROOT/models/Qwen2.5-Math-1.5B}
rollout_batch_size=128
n_samples_per_prompts=16
episode=10000
temperature=1.0
batch_size=1024
lr=1e-6
kl_loss_coef=0.0
kl_coef=0.0
entropy_coeff=0
max_gen_length=3072
numcall=1
dataset_name=torl_data
run_name=rl.grpo_qwen.math.1.5b_${dataset_name}_numcall${numcall}
samples_save_path=$ROOT/samples/$run_name
data_path=$ROOT/data/${dataset_name}
mkdir -p $samples_save_path
declare -r gpus=8

# What the prompt looks like depends on the model.
if [[ "$policy_path" == *Instruct* ]]; then
    template=chat
else
    template=base
fi

HYDRA_FULL_ERROR=1 python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files=[$data_path/train.parquet] \
    data.val_files=[$data_path/test.parquet] \
    data.train_batch_size=$rollout_batch_size \
    data.val_batch_size=1024 \
    data.max_prompt_length=400 \
    data.max_response_length=$max_gen_length \
    data.template_type=$template \
    actor_rollout_ref.model.path=$policy_path \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=$lr \
    actor_rollout_ref.actor.ppo_mini_batch_size=$batch_size \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16000 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=$kl_loss_coef \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.entropy_coeff=$entropy_coeff \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.temperature=$temperature \
    actor_rollout_ref.rollout.n=$n_samples_per_prompts \
    actor_rollout_ref.rollout.num_llm_calls_available=$numcall \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.free_cache_engine=True \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    algorithm.kl_ctrl.kl_coef=$kl_coef \
    critic.ppo_micro_batch_size_per_gpu=4 \
    trainer.critic_warmup=0 \
    trainer.logger=['console','wandb'] \
    trainer.project_name=torl \
    trainer.experiment_name=${run_name} \
    trainer.n_gpus_per_node=$gpus \
    trainer.nnodes=1 \
    trainer.save_freq=20 \
    trainer.test_freq=10 \
    trainer.default_hdfs_dir=null \
    trainer.total_epochs=$episode \
    trainer.total_training_steps=500 "${@:2}"
