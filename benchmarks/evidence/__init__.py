"""Evidence for the paper's claims, on icons: baselines on their plateau, links, whole chains, seeds."""
