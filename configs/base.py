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

    c.mesh = ConfigDict()  # sizes of the device mesh; -1 is chosen by the devices there are (docs/pods.md)
    c.mesh.replica = -1  # copies of the parameters (between slices)
    c.mesh.fsdp = -1  # shards of parameters and batch
    c.mesh.expert = -1  # shards of the experts
    c.mesh.tensor = 1  # shards of heads, feed-forward width and vocabulary

    c.compiler = ConfigDict()
    c.compiler.options = ()  # "name=value" each, besides those of parallel/compiler_options.py or instead of them
    c.compiler.cache = ""  # folder (or gs://...) of compiled steps, so that a restart compiles nothing; "" keeps none

    c.data = ConfigDict()
    c.data.root = ""  # folder with one dataset folder per source (docs/data.md)
    c.data.sources = ("captions", "interleaved", "text")
    c.data.weights = (0.45, 0.45, 0.10)  # shares of real positions, one per source
    c.data.tokenizer = "bytes"  # or the path of a tokenizer.json; relative paths are looked up in data.root too
    c.data.plans = ""  # folder of the row plans; "" is data.root/plans
    c.data.window = 8192  # documents that are packed together
    c.data.caption_order = "image_first"  # image_first | text_first | random, for documents of one image and one text
    c.data.rows = "packed"  # packed | pairs: one image and its text a row, cut at row_length (encoders)
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
    c.image.positions = 256  # P: decoder positions of an image; (size / patch)^2 in early fusion; 0 in pairs
    c.image.per_row = 4  # I: image slots of a row
    c.image.augment = True  # random resized crop and flip in training; evaluation resizes only
    c.image.crop_scale = (0.4, 1.0)  # area of the random crop
    c.image.flip = 0.5  # probability of a horizontal flip
    c.image.mean = (0.485, 0.456, 0.406)
    c.image.std = (0.229, 0.224, 0.225)

    c.model = ConfigDict()
    c.model.family = "early_fusion"  # early_fusion | late_fusion; encoders: contrastive | aim | aimv2
    c.model.vocab_size = 50_432
    c.model.width = 1024
    c.model.depth = 24
    c.model.heads = 16
    c.model.kv_heads = 0  # grouped-query attention; 0 is as many as heads
    c.model.head_dim = 0  # 0 is width / heads
    c.model.ffn = "swiglu"  # swiglu | gelu | gelu_tanh | quick_gelu (those without a gate)
    c.model.ffn_width = 0  # 0 is 2/3 * 4 * width rounded up to a multiple of 256; 4 * width without a gate
    c.model.bias = False  # in all products and norms
    c.model.norm = "rmsnorm"  # rmsnorm | layernorm (without bias, as in DCLM)
    c.model.norm_eps = 1e-5
    c.model.norm_position = "pre"  # pre | post (after the sublayer, as in OLMo 2)
    c.model.qk_norm = "full"  # none | full (over all heads together) | head
    c.model.rope_theta = 10_000.0  # 0 is no rotary positions
    c.model.tie_embeddings = False
    c.model.patch_positions = False  # learned position of each patch, added to its embedding
    c.model.init = "fan_in_depth_scaled"  # fan_in_depth_scaled | open_lm | normal
    c.model.dtype = "bfloat16"  # of the computation; the master weights are float32
    c.model.attention = "auto"  # auto | reference | blocked | splash (TPU) | triton (NVIDIA GPU)
    c.model.scan_layers = True
    c.model.remat = "full"  # none | full | exchanges (keep what crossed the network) | minimal (and large products)
    c.model.vocab_chunks = 0  # chunks of the cross-entropy; 0 chooses by size

    c.model.delimiter_vectors = False  # boi and eoi are learned vectors, no vocabulary's embeddings
    c.model.delimiter_weights = "text"  # the weights they meet, where modalities differ: text | boi_image | image

    c.model.deep = ConfigDict()  # deep fusion: weights that images have for themselves (docs/architectures.md)
    c.model.deep.modules = ()  # of qkv, out, ffn, norms; () is one set of weights for all
    c.model.deep.every = 1  # every n-th layer: layers n - 1, 2n - 1, ...
    c.model.deep.initial = "random"  # random | copy (of the text's)
    c.model.deep.qkv_bias = False  # biases in the images' qkv

    c.model.vision = ConfigDict()  # the vision tower of late fusion and of encoders
    c.model.vision.width = 1024
    c.model.vision.depth = 24
    c.model.vision.heads = 16
    c.model.vision.ffn = "swiglu"  # as model.ffn
    c.model.vision.ffn_width = 0
    c.model.vision.bias = False
    c.model.vision.norm = "layernorm"
    c.model.vision.norm_eps = 1e-5
    c.model.vision.norm_position = "pre"
    c.model.vision.qk_norm = "none"
    c.model.vision.patch_bias = True
    c.model.vision.positions = "learned"  # learned | sincos (fixed)
    c.model.vision.embedding_norm = "none"  # none | before_positions | after_positions
    c.model.vision.class_token = False
    c.model.vision.final_norm = True
    c.model.vision.feature_layer = -1  # whose output is used: -1 the last and its norm, -2 the one before, ...

    c.model.connector = ConfigDict()  # from the vision tower's patches to image.positions of the decoder
    c.model.connector.kind = "mlp"  # linear | mlp | average | attention | c_abstractor | glu
    c.model.connector.width = 0  # inside; 0 chooses by kind
    c.model.connector.depth = 0  # layers of attention, blocks of a c_abstractor's stage; 0 chooses by kind
    c.model.connector.heads = 0  # of attention; 0 is the vision tower's
    c.model.connector.downsample = 1  # 2: a convolution of stride 2 before glu, as in CogVLM2

    c.model.contrastive = ConfigDict()  # pairs of image and text
    c.model.contrastive.loss = "softmax"  # softmax (CLIP) | sigmoid (SigLIP)
    c.model.contrastive.width = 512  # of the space that both are mapped to
    c.model.contrastive.pooling = "class"  # class | mean | attention: of the vision tower
    c.model.contrastive.text_attention = "causal"  # causal | bidirectional
    c.model.contrastive.scale = 1 / 0.07  # initial, of the similarities; learned
    c.model.contrastive.max_scale = 100.0  # the learned scale is clamped to [1, this]; 0 is not
    c.model.contrastive.bias = -10.0  # initial, of sigmoid; learned

    c.model.aim = ConfigDict()  # the next patch's pixels
    c.model.aim.head_width = 2048
    c.model.aim.head_depth = 12  # MLP blocks between the trunk and the pixels (AIM); AIMv2 has one linear layer
    c.model.aim.pixel_weight = 0.4  # of the pixel loss beside the text loss (AIMv2)

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
    c.optimizer.decay_exclude = (  # substrings of parameter paths: all that is no matrix
        "norm", "bias", "positions", "class_token", "delimiters", "queries", "probe", "contrastive/scale",
    )  # fmt: skip
    c.optimizer.clip_norm = 1.0  # 0 is off
    c.optimizer.z_loss = 0.0
    c.optimizer.vision_scale = 1.0  # of the learning rate and decay of the vision tower
    c.optimizer.freeze = ()  # patterns of parameter paths ("vision/*") that are not trained

    c.schedule = ConfigDict()
    c.schedule.kind = "wsd"  # wsd (warm-up, stable, cooldown) | cosine
    c.schedule.warmup = 100  # steps
    c.schedule.cooldown = 0  # last steps of the run; 0 is a trunk that can be cooled down from any checkpoint
    c.schedule.cooldown_shape = "1-sqrt"  # 1-sqrt | linear
    c.schedule.final_ratio = 0.0  # of the peak, at the end

    c.trunk = ConfigDict()  # start from another run's checkpoint (weights, optimizer, step, data position)
    c.trunk.workdir = ""
    c.trunk.step = -1  # -1 is its last

    c.start = ConfigDict()  # begin with the weights of other runs (of ours, or imported: docs/interop.md)
    c.start.vision = ""  # its vision tower
    c.start.decoder = ""  # its embeddings, layers, final norm and head
    c.start.connector = ""  # its connector and delimiter vectors

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
    c.log.wandb = ""  # project of Weights & Biases, where its package is installed; "" is none
    c.log.progress = True  # the live line with ETA

    c.profile = ConfigDict()
    c.profile.start = 0  # first step of the profiler's window
    c.profile.steps = 0  # its length; 0 is off
    return c
