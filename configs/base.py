"""Every key a run can have, with its default and its meaning. Families of experiments fork this.

The keys here are the whole option surface (tests/test_configs.py pins it). A family's `get_config`
starts from `base()`, changes what it is about, and returns the config locked.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The dense early-fusion model on a 45/45/10 mixture, at no particular size."""
    c = ConfigDict()
    c.seed = 0  # of the weights, the order of the data and its augmentation
    c.steps = 1_000  # the run ends here; the schedule's cooldown ends here too
    c.batch_rows = 8  # rows of the global batch, over all devices and processes
    c.row_length = 1024  # S: positions of a row
    c.gradient_accumulation = 1  # microbatches of a step; divides batch_rows

    c.mesh = ConfigDict()  # sizes of the device mesh; one of them may be -1: the devices that are left
    c.mesh.replica = 1  # copies of the parameters (between slices)
    c.mesh.fsdp = -1  # shards of parameters and batch
    c.mesh.expert = 1  # shards of the experts
    c.mesh.tensor = 1  # shards of heads, feed-forward width and vocabulary

    c.data = ConfigDict()
    c.data.root = ""  # folder with one dataset folder per source (docs/data.md)
    c.data.sources = ("captions", "interleaved", "text")
    c.data.weights = (0.45, 0.45, 0.10)  # shares of real positions, one per source
    c.data.tokenizer = "bytes"  # or the path of a tokenizer.json; relative paths are looked up in data.root too
    c.data.plans = ""  # folder of the row plans; "" is data.root/plans
    c.data.window = 8192  # documents that are packed together
    c.data.caption_order = "image_first"  # image_first | text_first | random, for documents of one image and one text
    c.data.image_delimiters = False  # surround each image with the reserved boi and eoi tokens
    c.data.image_attention = "bidirectional"  # bidirectional | causal: how patches of one image see each other
    c.data.image_rotary = "sequential"  # sequential | shared: one rotary position for all patches of an image
    c.data.workers = 2  # that build batches ahead; 0 builds in the loop
    c.data.worker_kind = "threads"  # threads | processes
    c.data.prefetch = 4  # batches built ahead
    c.data.accept_changed_plans = False  # go on from a checkpoint although the data's fingerprint differs

    c.image = ConfigDict()
    c.image.size = 224  # pixels, height and width as the model sees it
    c.image.patch = 14
    c.image.positions = 256  # P: decoder positions of an image; (size / patch)^2 in early fusion
    c.image.per_row = 4  # I: image slots of a row
    c.image.augment = True  # random resized crop and flip in training; evaluation resizes only
    c.image.crop_scale = (0.4, 1.0)  # area of the random crop
    c.image.flip = 0.5  # probability of a horizontal flip
    c.image.mean = (0.485, 0.456, 0.406)
    c.image.std = (0.229, 0.224, 0.225)

    c.model = ConfigDict()
    c.model.family = "early_fusion"
    c.model.vocab_size = 50_432
    c.model.width = 1024
    c.model.depth = 24
    c.model.heads = 16
    c.model.kv_heads = 0  # grouped-query attention; 0 is as many as heads
    c.model.head_dim = 0  # 0 is width / heads
    c.model.ffn_width = 0  # 0 is 2/3 * 4 * width rounded up to a multiple of 256
    c.model.norm = "rmsnorm"  # rmsnorm | layernorm (without bias, as in DCLM)
    c.model.norm_eps = 1e-5
    c.model.norm_position = "pre"  # pre | post (after the sublayer, as in OLMo 2)
    c.model.qk_norm = "full"  # none | full (over all heads together) | head
    c.model.rope_theta = 10_000.0
    c.model.tie_embeddings = False
    c.model.patch_positions = False  # learned position of each patch, added to its embedding
    c.model.init = "fan_in_depth_scaled"  # fan_in_depth_scaled | open_lm | normal
    c.model.dtype = "bfloat16"  # of the computation; the master weights are float32
    c.model.attention = "auto"  # auto | reference | blocked
    c.model.scan_layers = True
    c.model.remat = "full"  # none | full | exchanges (keep what crossed the network) | minimal (and large products)
    c.model.vocab_chunks = 0  # chunks of the cross-entropy; 0 chooses by size

    c.model.moe = ConfigDict()  # mixture of experts (docs/moe.md)
    c.model.moe.experts = 0  # experts of a layer; 0 is a dense model
    c.model.moe.top_k = 1  # experts that a token goes to
    c.model.moe.every = 1  # every n-th layer has experts: layers n - 1, 2n - 1, ...
    c.model.moe.shared = 0  # experts that every token passes, besides its own
    c.model.moe.granularity = 1  # m: experts, shared and top_k times m, each of 1/m of the feed-forward width
    c.model.moe.modality = "agnostic"  # agnostic | grouped (a router for each modality) | fixed (one expert for each)
    c.model.moe.image_experts = 0  # of the experts, where they are grouped; 0 is half
    c.model.moe.renormalise = False  # gates of the chosen experts sum to 1; not with one choice
    c.model.moe.balance = "loss"  # loss | bias (of the choice, moved after each step; no loss)
    c.model.moe.balance_loss = 0.01  # weight of the load-balancing loss
    c.model.moe.z_loss = 0.001  # weight of the router z-loss
    c.model.moe.bias_rate = 0.001  # what a bias moves in a step
    c.model.moe.buffer_factor = 0.0  # room for tokens on a device, times the mean; 0 is for all: none is dropped
    c.model.moe.transport = "auto"  # auto | ragged | padded | gather: how tokens travel over mesh.expert
    c.model.moe.grouped_matmul = "auto"  # auto | blocks | megablox | tokamax

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4  # peak
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 1e-4  # fully decoupled: w <- w (1 - weight_decay * lr_t / lr_peak)
    c.optimizer.decay_exclude = ("norm", "bias", "patch_positions")  # substrings of parameter paths
    c.optimizer.clip_norm = 1.0  # 0 is off
    c.optimizer.z_loss = 0.0

    c.schedule = ConfigDict()
    c.schedule.kind = "wsd"  # wsd (warm-up, stable, cooldown) | cosine
    c.schedule.warmup = 100  # steps
    c.schedule.cooldown = 0  # last steps of the run; 0 is a trunk that can be cooled down from any checkpoint
    c.schedule.cooldown_shape = "1-sqrt"  # 1-sqrt | linear
    c.schedule.final_ratio = 0.0  # of the peak, at the end

    c.trunk = ConfigDict()  # start from another run's checkpoint (weights, optimizer, step, data position)
    c.trunk.workdir = ""
    c.trunk.step = -1  # -1 is its last

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps; one more is saved at the end and on SIGTERM
    c.checkpoint.keep = 3  # the last so many
    c.checkpoint.keep_every = 0  # steps; those at its multiples are kept for ever; 0 is none

    c.evaluation = ConfigDict()
    c.evaluation.rows = 128  # held-out rows per source, at most
    c.evaluation.batch_rows = 8
    c.evaluation.questions = 1_000  # of each kind, at most

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl
    c.log.tensorboard = True
    c.log.progress = True  # the live line with ETA

    c.profile = ConfigDict()
    c.profile.start = 0  # first step of the profiler's window
    c.profile.steps = 0  # its length; 0 is off
    return c
