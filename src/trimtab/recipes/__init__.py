"""Papers as rows. No logic here: a row is a name for a pipeline, with what its paper claims."""
from __future__ import annotations

from trimtab.core.spec import recipe
from trimtab.core.types import Claim

recipe("magnitude", "site | magnitude | uniform | mask", source="arXiv:1506.02626 (Han et al. 2015)",
       note="Ranks a whole matrix, as baselines do; `magnitude(unit=row)` compares within rows and is weaker here.")
recipe("random", "row | random | uniform | mask", source="common practice", note="The floor every score must beat.")
recipe("wanda", "row | wanda | uniform | mask", source="arXiv:2306.11695 (Sun et al. 2023)", claims=[
    Claim("better than magnitude at 50 %", "wanda", "magnitude", "50%", "LLaMA-2-7B WikiText-2 6.42 against 14.89"),
    Claim("better than magnitude at 2:4", "wanda(unit=2:4)", "magnitude(unit=2:4)", "2:4-mlp", "LLaMA-2-7B 11.02 against 54.59"),
])
recipe("dass", "*.gate,*.up: column | dass | uniform | mask ; *.down: row | wanda | uniform | mask ; attn: row | wanda | uniform | mask",
       source="arXiv:2405.01943 (DaSS)", claims=[
    Claim("better than Wanda at 2:4 on the MLPs", "dass(unit=2:4)", "wanda(unit=2:4)", "2:4-mlp", "figures not read"),
], note="The paper prunes the MLPs only; with scope `all` the attention takes Wanda. 2:4 of gate and up runs along the output.")
recipe("gblm", "row | gblm(order=dense) | uniform | mask", source="arXiv:2311.04902 (GBLM-Pruner)", claims=[
    Claim("better than Wanda at 50 %", "gblm", "wanda", "50%", "LLaMA-2-7B 6.86; baselines recalled, not asserted"),
])
recipe("taylor", "row | taylor(order=dense) | uniform | mask", source="arXiv:1611.06440 (Molchanov et al. 2016)")
recipe("obs", "row | obs | uniform | mask | least_squares", source="Hassibi and Stork 1993",
       note="Saliency of the optimal brain surgeon, all weights dropped at once, then the exact refit.")
recipe("sparsegpt", "site | sparsegpt | uniform", source="arXiv:2301.00774 (Frantar and Alistarh 2023)", claims=[
    Claim("better than magnitude at 50 %", "sparsegpt", "magnitude", "50%", "LLaMA-2-7B WikiText-2 6.51 against 14.89"),
    Claim("better than Wanda at 2:4", "sparsegpt(unit=2:4)", "wanda(unit=2:4)", "2:4-mlp", "LLaMA-2-7B 10.17 against 11.02"),
])
recipe("admm", "site | edit/admm | uniform", source="arXiv:2401.02938 (Boza 2024)", claims=[
    Claim("better than SparseGPT at 50 %", "admm", "sparsegpt", "50%", "figures recalled, not asserted"),
    Claim("better than Wanda at 50 %", "admm", "wanda", "50%", "figures recalled, not asserted"),
])
recipe("obert", "site | obert(order=dense) | uniform | mask", source="arXiv:2203.07259 (oBERT)", claims=[
    Claim("better than magnitude at 50 %", "obert", "magnitude", "50%", "with retraining, on BERT; here one shot"),
])
recipe("chita", "site | chita(order=dense) | uniform", source="arXiv:2302.14623 (CHITA)", claims=[
    Claim("better than magnitude at 50 %", "chita", "magnitude", "50%", "on image classifiers"),
])
recipe("nettrim", "site | nettrim | uniform", source="arXiv:1611.05162 (Net-Trim)", claims=[
    Claim("better than magnitude at 50 %", "nettrim", "magnitude", "50%", "on small classifiers"),
])
recipe("lamp", "site | magnitude | lamp | mask", source="arXiv:2010.07611 (LAMP)", claims=[
    Claim("better than a uniform share at 70 %", "lamp", "magnitude", "70%", "on image classifiers"),
    Claim("better than one global threshold at 70 %", "lamp", "magnitude(unit=model)", "70%", "on image classifiers"),
])
recipe("wanda_owl", "row | wanda | owl(outlier=5) | mask", source="arXiv:2310.05175 (OWL)", claims=[
    Claim("better than uniform Wanda at 70 %", "wanda_owl", "wanda", "70%", "LLaMA-7B WikiText-2 24.55 against 85.77"),
])
recipe("wanda_redundancy", "row | wanda | redundancy | mask", source="measure of arXiv:2406.15786 (LLM-Drop) as a budget; ours",
       claims=[Claim("better than uniform Wanda at 70 %", "wanda_redundancy", "wanda", "70%", "ours: no figure")])
recipe("blocks", "block(b=32) | magnitude | uniform | mask", source="arXiv:2507.03117 (BLaST), one shot, without its training",
       note="The paper trains through the sparsification; one shot at 95 % is an honest zero point, not its result.")
recipe("rtn", "int(bits=4,group=128) | rtn", source="common practice; the baseline of arXiv:2210.17323 (GPTQ)",
       note="Round to nearest. After a pruning pass it keeps the zeros: `nm(n=2,m=4) | wanda ; rtn(bits=4)`.")
recipe("gptq", "int(bits=4,group=128) | gptq", source="arXiv:2210.17323 (Frantar et al. 2022)", claims=[
    Claim("better than rounding to nearest at 4 bits", "gptq(bits=4)", "rtn(bits=4)", "4-bits", "figures recalled, not asserted"),
    Claim("better than rounding to nearest at 3 bits", "gptq(bits=3)", "rtn(bits=3)", "3-bits", "figures recalled, not asserted"),
], note="`gptq(grid=nf)`, `gptq(asymmetric=true)`, `gptq(act_order=true)`: any grid, with the same sweep.")
recipe("awq", "awq | int(bits=4,group=128,asymmetric=true) | rtn | clip", source="arXiv:2306.00978 (Lin et al. 2023)", claims=[
    Claim("better than rounding to nearest at 4 bits", "awq(bits=4)", "rtn(asymmetric=true,bits=4)", "4-bits",
          "figures recalled, not asserted"),
    Claim("better than rounding to nearest at 3 bits", "awq(bits=3)", "rtn(asymmetric=true,bits=3)", "3-bits",
          "figures recalled, not asserted"),
], note="`awq | int(bits=4) | gptq` rounds behind the same scales by GPTQ.")
recipe("ldlq", "midrise(clip=rms) | ldlq | greedy", source="arXiv:2307.13304 (Chee et al. 2023), QuIP without incoherence", claims=[
    Claim("better than GPTQ at 2 bits", "ldlq(bits=2)", "gptq(bits=2)", "2-bits",
          "there behind incoherence; figures recalled, not asserted"),
], note="The source's range and grid, fitted before the sweep; `greedy` behind any rounding: `int(bits=3) | gptq | greedy`.")
recipe("adaround", "int(bits=4,group=128) | adaround", source="arXiv:2004.10568 (Nagel et al. 2020)", claims=[
    Claim("better than rounding to nearest at 4 bits", "adaround(bits=4)", "rtn(bits=4)", "4-bits",
          "on image classifiers; figures recalled, not asserted"),
], note="Layer by layer; `int(clip=mse) | adaround | greedy` goes on where the learned codes can still be bettered one by one.")
recipe("adaquant", "int(bits=4,group=128) | adaquant", source="arXiv:2006.10518 (Hubara et al. 2020)", claims=[
    Claim("better than rounding to nearest at 4 bits", "adaquant(bits=4)", "rtn(bits=4)", "4-bits", "on image classifiers"),
], note="Its bits are a budget, `knapsack`; in place of its tuning of biases and batch norms there are the repairs `bias` and `gain`.")
recipe("knapsack", "knapsack(mean=3.25) | int(bits=2/3/4,group=64,clip=mse) | rtn", source="arXiv:2006.10518 (Hubara et al. 2020)", claims=[
    Claim("better than the same bits everywhere", "knapsack", "rtn(bits=3,clip=mse,group=64)", "3-bits", "on image classifiers"),
], note="`knapsack(mean=4.5) | int(bits=3/4/8) | gptq`: values of any knob of any grid, with `/` between them.")
recipe("svd", "svd", source="Eckart and Young 1936; the baseline of arXiv:2403.07378 (SVD-LLM)",
       note="`--keep` is the share of parameters; above `out * in / (out + in)` a rank takes more than the weight did.")
recipe("svdllm", "svdllm", source="arXiv:2403.07378 (Wang et al. 2024), SVD-LLM, its whitening", claims=[
    Claim("better than plain singular value decomposition with 80 % of the parameters", "svdllm", "svd", "rank-20%",
          "figures recalled, not asserted"),
])
recipe("svdllm_ranks", "ranks | svdllm", source="ours: the knapsack of arXiv:2006.10518 over the ranks of arXiv:2403.07378", claims=[
    Claim("better than one share for all with 80 % of the parameters", "svdllm_ranks", "svdllm", "rank-20%", "ours: no figure"),
], note="The rank of every layer by what it costs the network; `ranks` stands in front of any factors, such as `ranks | cur`.")
recipe("utilised", "utilised", source="arXiv:2407.04797 (Garg et al. 2024)", claims=[
    Claim("better than plain singular value decomposition with 80 % of the parameters", "utilised", "svd", "rank-20%",
          "half of the parameters of ViT-B/16 for less than 0.2 % of accuracy, after fine-tuning"),
], note="`utilised(energy=0.99)` lets every layer have the rank that it uses; `trimtab inspect` says what that is.")
recipe("cur", "cur", source="arXiv:2501.04211 (Park and Moon 2025), CURing", claims=[
    Claim("better than plain singular value decomposition with 80 % of the parameters", "cur", "svd", "rank-20%",
          "the paper compares with pruned layers; ours: no figure"),
], note="`cur(whiten=true)` links rows and columns for the nearest outputs. Half of every product are rows of the weight as they were.")
recipe("fedpara", "fedpara", source="arXiv:2108.06098 (Hyeon-Woo et al. 2022), FedPara, fitted to trained weights", claims=[
    Claim("better than plain singular value decomposition with 80 % of the parameters", "fedpara", "svd", "rank-20%",
          "the paper trains its factors; ours: no figure"),
], note="Two products, multiplied entry by entry: smaller files, the same time, as the runtime makes the weight of them.")
recipe("acip", "acip | svd", source="arXiv:2502.01717 (Genzel et al. 2025), ACIP, without its adapter", claims=[
    Claim("better than plain singular value decomposition with 80 % of the parameters", "acip", "svd", "rank-20%",
          "figures not read"),
    Claim("better than whitening with 80 % of the parameters", "acip", "svdllm", "rank-20%", "figures not read"),
], note="One training ranks all singular values; `acip(source=OUT)` takes that of an earlier run for another size. "
        "`acip | svdllm` is in front of other factors.")
recipe("ternary", "ternary(group=0) | rtn", source="grid of arXiv:2402.17764 (BitNet b1.58), one shot, without its training",
       note="Below two bits a weight, for a model that was trained to be ternary; of any other it is an honest zero point.")
recipe("quip", "incoherent | int(bits=2,group=64,asymmetric=true,clip=mse) | gptq", source="arXiv:2307.13304 (Chee et al. 2023)", claims=[
    Claim("better than GPTQ at 2 bits", "quip", "gptq(bits=2,group=64,asymmetric=true,clip=mse)", "2-bits",
          "figures recalled, not asserted"),
], note="`incoherent | int(bits=2,group=0,clip=rms) | ldlq` is the paper's own grid; `hadamard` in place of `incoherent` as in QuIP#.")
recipe("lorc", "int(bits=4,group=128) | rtn | lorc(rank=8)", source="arXiv:2303.08302 (Yao et al. 2023)", claims=[
    Claim("better than rounding to nearest alone at 4 bits", "lorc(bits=4)", "rtn(bits=4)", "4-bits", "figures recalled, not asserted"),
    Claim("better than rounding to nearest alone at 3 bits", "lorc(bits=3)", "rtn(bits=3)", "3-bits", "figures recalled, not asserted"),
], note="`gptq(bits=2) | lorc` behind any codes; `lorc(whiten=true)` is nearest in the outputs.")
recipe("gain", "int(bits=4,group=128) | rtn | gain", source="ours, for the re-tuned batch norms of arXiv:2006.10518", claims=[
    Claim("better than rounding to nearest alone at 4 bits", "gain(bits=4)", "rtn(bits=4)", "4-bits", "ours: no figure"),
    Claim("better than rounding to nearest alone at 3 bits", "gain(bits=3)", "rtn(bits=3)", "3-bits", "ours: no figure"),
], note="No byte more: the scales take it in. Behind any codes, `gptq(bits=2)` too, and in front of `lorc` or `bias`.")
recipe("rilq", "int(bits=2,group=64,asymmetric=true,clip=mse) | gptq | rilq", source="arXiv:2412.01129 (Lee et al. 2025)", claims=[
    Claim("better than the same rounding alone at 2 bits", "rilq(bits=2)", "gptq(bits=2,group=64,asymmetric=true,clip=mse)", "2-bits",
          "up to 8.1 points of accuracy on LLaMA-3 behind QuIP#"),
], note="`int(bits=3) | rtn | rilq(rank=32)` behind any codes; more `epochs` of few samples are learned by heart.")
recipe("super_weight", "*.down: site | spike | uniform | spare(keep=0.01%) ; all: int(bits=4,group=128) | rtn",
       source="arXiv:2411.07191 (Yu et al. 2024)", claims=[
    Claim("better than rounding to nearest alone at 4 bits", "super_weight", "rtn(bits=4)", "4-bits", "figures recalled, not asserted"),
], note="Small networks have no super weight: `spare` then keeps what is largest, and little is gained.")
recipe("llm_int8", "above(limit=6) | peak | spare(bits=8) ; int(bits=8,group=0) | rtn | token",
       source="arXiv:2208.07339 (Dettmers et al. 2022)",
       note="Inputs whose magnitude reaches 6 are multiplied beside the others, which are rounded by the token.")
recipe("w8a8", "int(bits=8,group=0) | rtn | token", source="common practice; the baseline of arXiv:2211.10438 (SmoothQuant)",
       note="`w8a8(act_bits=6)`; `int(bits=8,group=0) | gptq | static` with one step for all tokens, as calibration found it.")
recipe("fp8", "fp(bits=8,exponent=4,group=0,clip=max) | rtn", source="the format of arXiv:2209.05433 (Micikevicius et al. 2022), e4m3",
       note="`export --to compressed-tensors` writes it as float8, with `--type fp8` inputs in float8, too.")
recipe("smoothquant", "smoothquant | int(bits=8,group=0) | rtn | static(clip=max)",
       source="arXiv:2211.10438 (Xiao et al. 2022), O3", claims=[
    Claim("better than the same without its scales", "smoothquant", "int(bits=8,group=0) | rtn | static(clip=max)", "w8a8",
          "figures recalled, not asserted"),
], note="`smoothquant | int(bits=8,group=0) | rtn | token` is its O1.")
recipe("qqq", "smooth | int(bits=4,group=128) | gptq | token", source="arXiv:2406.09904 (Zhang et al. 2024)", claims=[
    Claim("better than the same without its scales", "qqq", "int(bits=4,group=128) | gptq | token", "w4a8", "figures not read"),
], note="`qqq(group=0)` by row, as its fastest kernel has it; `kurtail | int(bits=4,group=128) | gptq | token` turns in place of scaling.")
recipe("quarot", "quarot | int(bits=4,group=0) | gptq | token(act_bits=4)", source="arXiv:2404.00456 (Ashkboos et al. 2024)", claims=[
    Claim("better than the same without its rotations", "quarot", "int(bits=4,group=0) | gptq | token(act_bits=4)", "w4a4",
          "figures recalled, not asserted"),
], note="Packed, neighbours take the rotations: but for the inputs of the MLP's last map and the head's they cost nothing. "
        "`quarot | int(bits=2,group=64) | gptq` rounds weights alone behind them.")
recipe("kurtail", "kurtail | int(bits=4,group=0) | gptq | token(act_bits=4)", source="arXiv:2503.01483 (Akhondzadeh et al. 2025)", claims=[
    Claim("better than QuaRot's rotations with weights and inputs of 4 bits", "kurtail", "quarot", "w4a4",
          "15.5 % less perplexity than QuaRot on Wiki text"),
], note="Each input turns in a basis of its own, which the runtime applies. `kurtail(scale=1) | int(bits=2,group=64) | gptq` rounds "
        "weights alone, and looks at theirs, too.")
recipe("outliertune", "*.q,*.k,*.v,*.gate,*.up: channelwise | int(bits=8,group=0) | rtn | static(act_bits=6,clip=max) ; "
       "*.o,*.down: int(bits=8,group=0) | rtn | token(act_bits=6)", source="arXiv:2406.18832 (Wang et al. 2024)", claims=[
    Claim("better than one step for all channels with inputs of 6 bits", "outliertune",
          "*.q,*.k,*.v,*.gate,*.up: int(bits=8,group=0) | rtn | static(act_bits=6,clip=max) ; "
          "*.o,*.down: int(bits=8,group=0) | rtn | token(act_bits=6)", "w8a6", "figures recalled, not asserted"),
], note="Behind norms a step by the channel, folded into them; elsewhere by the token. Inputs are centred where norms have a bias (OPT, "
        "GPT-2, GPT-NeoX, ViT), not in Llama's kind.")
recipe("repquant", "*.q,*.k,*.v,*.gate,*.up: channelwise(act_bits=6,clip=mse) | int(bits=8,group=0) | adaquant | static(act_bits=6) ; "
       "*.o,*.down: int(bits=8,group=0) | adaquant | static(act_bits=6)", source="arXiv:2402.05628 (Li et al. 2024)", claims=[
    Claim("better than one step for all channels with inputs of 6 bits", "repquant",
          "int(bits=8,group=0) | adaquant | static(act_bits=6)", "w8a6", "on vision transformers; figures not read"),
], note="Softmax is not rounded here, and so needs no logarithmic codes.")
recipe("adpq", "site | magnitude | uniform | spare(keep=8%,single=4) ; int(bits=4,group=128) | rtn",
       source="arXiv:2405.13358 (AdpQ) and arXiv:2501.09107, statistical pre-calibration (Ghaffari et al. 2024, 2025)", claims=[
    Claim("better than rounding to nearest alone at 4 bits", "adpq(bits=4,single=4)", "rtn(bits=4)", "4-bits", "figures not read"),
    Claim("better than rounding to nearest alone at 3 bits", "adpq(bits=3,single=3)", "rtn(bits=3)", "3-bits", "figures not read"),
], note="Adaptive LASSO shrinks to zero what has |w|^2 <= lambda': the share above it, 8 % as recalled, is what a threshold of magnitude "
        "keeps. `site | magnitude | spare(keep=1%) ; int(bits=3) | gptq` goes on from a split of fewer bytes.")
recipe("ptq161", "inputs | peak | uniform | spare(keep=0.2,bits=4) ; ptq161", source="arXiv:2502.13179 (Zhao et al. 2025)", claims=[
    Claim("better than GPTQ at 2 bits", "ptq161", "gptq(bits=2)", "2-bits", "figures not read"),
])
recipe("vptq", "vptq", source="arXiv:2409.17066 (Liu et al. 2024)", claims=[
    Claim("better than GPTQ at 2 bits", "vptq", "gptq(bits=2,group=64,asymmetric=true,clip=mse)", "2-bits",
          "figures recalled, not asserted"),
], note="`vptq(residual=1)` has 3 bits a weight; `inputs | peak | spare(keep=1%,bits=8) ; vptq` spares the outliers. The "
        "kernels read books of up to 256 vectors (bits * vector at most 8) the fastest.")
recipe("onebit", "onebit", source="arXiv:2402.11295 (Xu et al. 2024), its initialisation, without the training",
       note="One bit a weight: a start for training, and an honest zero point without it.")
recipe("adadim", "int(bits=4,group=128) | adadim", source="arXiv:2309.15531 (Heo et al. 2023)", claims=[
    Claim("better than rounding to nearest at 3 bits", "adadim(bits=3)", "rtn(bits=3)", "3-bits", "figures recalled, not asserted"),
], note="`adadim(feedback=true)` is GPTQ-ada.")
recipe("gate_magnitude", "gate_magnitude", source="arXiv:2408.14690 (Liu et al. 2024, TEAL), one share everywhere",
       note="`--keep` is the share of inputs computed. `gptq ; gate_magnitude(keep=0.5)` gates a quantised model.")
recipe("teal", "teal | gate_magnitude", source="arXiv:2408.14690 (Liu et al. 2024, TEAL)", claims=[
    Claim("shares split by error better than one for all, at 50 %", "teal", "gate_magnitude", "gates-50%", "figures not read"),
],
       note="Inside every block the shares that cost its outputs least. `teal | wina`: those of another gate.")
recipe("wina", "wina", source="arXiv:2505.19427 (Chen et al. 2025)", claims=[
    Claim("better than the magnitude of inputs alone at 65 %, as many of every token", "wina", "gate_magnitude(exact=true)", "gates-65%",
          "up to 2.94 % better average performance than TEAL at the same sparsity"),
    Claim("the same at 50 %, both by thresholds", "wina(exact=false)", "gate_magnitude", "gates-50%", "figures not read"),
])
recipe("cats", "*.down: cats", source="arXiv:2404.08763 (Lee et al. 2024)")
recipe("chess", "*.down: chess ; *.q,*.o: gate_magnitude", source="arXiv:2409.01366 (He et al. 2024)", claims=[
    Claim("a threshold a channel of the gate better than one a layer, at 50 %", "*.down: gated | chess", "cats", "gates-50%",
          "lower degradation over 8 downstream tasks"),
])
recipe("lazy", "*.down: gate_magnitude(exact=true)", source="arXiv:2210.06313 (Li et al. 2022, the lazy neuron phenomenon), its top-k",
       note="As many hidden neurons of every token, the largest of what the last map of the MLP meets: so nothing but that map is saved. "
            "There the network is trained with it, here it is not; where nothing was trained to be sparse it is an honest zero point.")
recipe("dejavu", "*.down: predictor", source="arXiv:2310.17157 (Liu et al. 2023, Deja Vu), its predictor of an MLP",
       note="Made for ReLU: with SiLU hardly a neuron is zero, and what is small is hard to foretell. `dejavu(exact=true)` computes "
            "as many neurons of every token. Its predictor of heads is that of `polar` here.")
recipe("polar", "*.down: polar ; *.o&!0.*: heads", source="arXiv:2505.14884 (Shrestha et al. 2025, Polar Sparsity)",
       note="Made for ReLU and for steps of several sequences: `polar(batch=16)`, and the neurons alone as `*.down: gate/polar`. `--keep` "
            "is the share of heads, none of them left out in the first layer, and what of the neurons counts as active; where most are, as "
            "with SiLU, nearly all are computed.")
recipe("coreinfer", "*.down: core", source="arXiv:2410.18311 (Wang et al. 2024, CoreInfer), stability-guided",
       note="The first `prompt` tokens of a sequence are computed whole and decide for the others: `coreinfer(prompt=200)`. "
            "Neurons count by what is above zero, as with ReLU; with SiLU some of what matters is below.")
recipe("coreinfer_similar", "*.down: core_similar", source="arXiv:2410.18311 (Wang et al. 2024, CoreInfer), similarity-guided",
       note="For prompts too short to decide; `coreinfer_similar(prompt=16,clusters=8)`.")

# ---- parts of the network, with all their weights ---------------------------------------------------------------------
recipe("amp", "inner | amp | uniform | mask", source="arXiv:2504.21174 (AMP)", claims=[
    Claim("inputs projected onto weights say more than weights alone, with 30 % gone", "amp", "neuron | magnitude", "shapes-30%",
          "1.49 points of accuracy over the state of the art with 30 % gone"),
])
recipe("transact", "inner | transact | uniform | mask", source="arXiv:2407.05690 (TransAct)", claims=[
    Claim("what activations say is more than what weights alone do, with 30 % gone", "transact", "neuron | magnitude", "shapes-30%",
          "figures not read"),
    Claim("the same with 50 % gone", "transact", "neuron | magnitude", "shapes-50%", "figures not read"),
])
recipe("minitron", "neuron | minitron | uniform | mask", source="arXiv:2408.11796 (Minitron)", claims=[
    Claim("width costs less than depth, with 30 % gone", "minitron", "shortgpt", "shapes-30%", "figures not read"),
],
       note="Neurons alone, as the paper's models keep their heads; without the distillation that follows there.")
recipe("dead_neurons", "neuron | peak | alive | mask", source="arXiv:1607.03250 (Hu et al. 2016, network trimming), what never fires",
       note="No share to ask for: hidden neurons that are zero on every calibration token go, and nothing changes there. Where MLPs have a "
            "ReLU there may be some; elsewhere none.")
recipe("mlp_fusion", "mlp: neuron | fuse", source="arXiv:2307.08941 (MLP Fusion)", note="Without the fine-tuning that follows there.")
recipe("shortgpt", "layer | block_influence | mask", source="arXiv:2403.03853 (ShortGPT)")
recipe("llm_drop", "sublayer | influence | mask", source="arXiv:2406.15786 (LLM-Drop)", claims=[
    Claim("attention and MLP dropped jointly cost less than whole blocks, with 20 % gone", "llm_drop", "shortgpt", "shapes-20%",
          "31 sublayers of Llama-2-13B dropped keep 90 % of MMLU"),
    Claim("the same with 30 % gone", "llm_drop", "shortgpt", "shapes-30%", "figures not read"),
],
       note="Attention and MLP jointly; `attn: sublayer | influence` takes attention alone.")
recipe("attention_entropy", "attn: sublayer | entropy | mask", source="arXiv:2404.05657",
       note="Its way of finding the attentions that can go; without the training in which they fade.")
recipe("subclone", "subclone | activation | mask", source="arXiv:2312.09299 (Samragh et al. 2023, weight subcloning)",
       note="`subclone(config=PATH)`, or sizes: `subclone(layers=4,width=128,neurons=384)`. A start for training; `subclone(...) | wanda` "
            "ranks by another score.")
recipe("select", "select | mask", source="arXiv:2311.18823 (Xu et al. 2023, weight selection)",
       note="`select(config=PATH)`, or sizes: `select(layers=4,width=128,neurons=384)`. A start for training, without calibration.")
recipe("deeper_attention", "attn: sublayer | shallow | mask", source="arXiv:2407.15516")
recipe("tie", "edit/tie", source="ours; blocks that follow each other share their weights in MobileLLM, arXiv:2402.14905",
       note="Bytes of a packed model, and no time: every block computes with all of its weights. `tie(near=false)` pairs any two blocks.")
recipe("flexigpt", "block_influence | adapt", source="arXiv:2501.14713 (FlexiGPT)", claims=[
    Claim("better than to drop the blocks at 30 %", "flexigpt", "shortgpt", "shapes-30%", "figures not read; after a recovery training"),
], note="One shot, without the source's recovery training. `flexigpt(rank=0,scaled=false)` is the bare sharing.")
recipe("directshare", "*.q,*.k,*.v: direct", source="arXiv:2402.11819 (DirectShare)",
       note="--keep is the share that is left of the weights of heads, whose outputs stay.")

# ---- the network rewritten as a whole ---------------------------------------------------------------------------------
recipe("slicegpt", "principal ; channel | activation", source="arXiv:2401.15024 (Ashkboos et al. 2024, SliceGPT)", claims=[
    Claim("channels in the principal basis cost less than as they are, with 30 % gone", "slicegpt", "channel | wanda", "shapes-30%",
          "figures not read"),
],
       note="One basis for all blocks, and so nothing is added to the network; without the fine-tuning that may follow there.")
recipe("ffn_fusion", "attn: sublayer | influence | mask ; fusion", source="arXiv:2503.18908 (Bercovich et al. 2025, FFN Fusion)",
       note="`--keep` is the share of attention that stays; `ffn_fusion(length=2)`, `ffn_fusion(dependency=0.1)` fuse less. "
            "There attention goes by another program, and distillation follows.")
recipe("pre_rmsnorm", "rms", source="arXiv:2305.14858 (Jiang et al. 2023, Pre-RMSNorm)",
       note="Exact; OPT, GPT-2, GPT-NeoX and ViT. In torch on a processor it saves no time.")
recipe("parallel_layers", "parallel", source="arXiv:2212.06011 (Zhong et al. 2022), its layer in a network that was trained without",
       note="`parallel_layers(share=0.5)`, `parallel_layers(by=last)`. The paper trains such layers; without that it is an honest "
            "zero point.")
recipe("offline_norms", "offline", source="arXiv:2208.01313 (Yang et al. 2022, Unified Normalization), without its training",
       note="`offline_norms(share=0.1)`. In networks that were trained with norms of each token it is an honest zero point.")
recipe("union_of_experts", "experts", source="arXiv:2503.02495 (Yang et al. 2025), its equivalent decomposition",
       note="The same outputs. `experts(parts=8)`; `experts(always=1)` has a shared expert, which a qwen2 needs.")
recipe("upcycle", "upcycle", source="arXiv:2212.05055 (Komatsuzaki et al. 2022); arXiv:1806.02639 (Cai et al. 2018), replicate",
       note="The same outputs, from more weights: a start for training. `upcycle(parts=8,active=2)`.")
recipe("moefication", "moefication", source="arXiv:2110.01786 (Zhang et al. 2021)", claims=[
    Claim("neurons split by what they do, better than at random", "moefication", "moefication(split=random)", "experts-50%",
          "figures recalled, not asserted"),
], note="`--keep` is the share of an MLP that a token meets. A llama or mistral becomes a mixtral, a qwen3 a qwen3_moe.")
recipe("shared_experts", "moefication(parts=16,always=4)", source="arXiv:2502.04416 (Pei et al. 2025, CMoE), its shared experts", claims=[
    Claim("better than without experts that are always met", "shared_experts", "moefication(parts=16)", "experts-50%", "ours: no figure"),
], note="A llama, mistral or qwen2 becomes a qwen2_moe. Its router and its clusters are those of `moefication`.")
recipe("tomoe", "tomoe", source="arXiv:2501.15316 (Gao et al. 2026)", claims=[
    Claim("better than a smaller MLP of the same share", "tomoe", "mlp: neuron | wanda | mask | least_squares", "experts-50%",
          "figures not read"),
], note="Experts have neurons in common, so that the files grow: `tomoe(parts=2)` least. A token meets one of them.")
recipe("tie_embeddings", "table", source="arXiv:1608.05859 (Press and Wolf 2016)",
       note="One table in place of two, in plain files as well. The source trains with it; fitted afterwards it is a start for training.")
