"""Grow a trained CLIP into a larger one, and train that with a plain PyTorch loop."""

import torch

import compt


def train(teacher_path, batches):  # batches: float32 [B, 3, H, W] and int64 [B, context_length]
    teacher = compt.load_model(teacher_path).model
    student = compt.expand_model(teacher, "vit_micro", operator="net2net")
    widths = (student.spec.embed_dim, teacher.spec.embed_dim)
    project = torch.nn.ModuleList(torch.nn.Linear(*widths) for _ in range(2))
    optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=1e-3)
    for images, tokens in batches:
        with torch.no_grad():
            targets = teacher.encode_image(images), teacher.encode_text(tokens)
        features = student.encode_image(images), student.encode_text(tokens)
        loss = compt.contrastive_loss(*features, student.logit_scale.exp())
        for tower in range(2):
            loss = loss + compt.feature_distillation(project[tower](features[tower]), targets[tower]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{loss.item():.3f}")
    return student
