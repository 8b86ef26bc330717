#!/bin/bash
# Table F (b): fine-tune Vicuna with LoRA, after llava_align.sh. Run it in a checkout of LLaVA, on 8 GPUs:
#   bash llava_lora.sh EXPORT
# The paper names LLaVA-Instruct-150K. For LLaVA 1.5's own mixture:
#   DATA=llava_v1_5_mix665k.json IMAGES=. bash llava_lora.sh EXPORT
set -eu
tower=$(realpath "$1")
name=llava-v1.5-7b-$(basename "$tower")

deepspeed llava/train/train_mem.py \
    --lora_enable True \
    --lora_r 128 \
    --lora_alpha 256 \
    --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path lmsys/vicuna-7b-v1.5 \
    --version v1 \
    --data_path "./playground/data/${DATA:-llava_instruct_150k.json}" \
    --image_folder "./playground/data/${IMAGES:-coco/train2017}" \
    --vision_tower "$tower" \
    --pretrain_mm_mlp_adapter "./checkpoints/$name-align/mm_projector.bin" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "./checkpoints/$name-lora" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none
