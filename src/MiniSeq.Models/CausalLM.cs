using MiniSeq.Layers;
using TorchSharp;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>The score of a batch under the model.</summary>
/// <param name="LossSum">Σ −log p(target), in nats.</param>
/// <param name="TargetCount">Targets that count.</param>
/// <param name="Correct">Targets that the greedy prediction hits.</param>
public readonly record struct TokenScore(double LossSum, long TargetCount, long Correct)
{
    /// <summary>The sum of two scores.</summary>
    public static TokenScore operator +(TokenScore a, TokenScore b) => new(a.LossSum + b.LossSum, a.TargetCount + b.TargetCount, a.Correct + b.Correct);
}

/// <summary>Told in backward that gradients are complete: nothing is added to them any more, and the parameters are not read again. It may change both. Runs in the step's dispose scope.</summary>
/// <param name="lossSum">Σ −log p of the whole batch, float64: known before the first gradient is complete.</param>
/// <param name="parameters">Those of a module that require a gradient; one that the loss does not depend on has none.</param>
public delegate void GradientsCompleted(Tensor lossSum, IReadOnlyList<Parameter> parameters);

/// <summary>
/// A causal language model: embedding, decoder layers, norm and LM head, with parameters named as in Hugging Face checkpoints.
/// Training is driven, not recorded: <see cref="ForwardBackward"/> walks the layers itself and builds no graph across them.
/// </summary>
/// <remarks>
/// Kept from forward to backward: each layer's input, L · rows · d numbers, in memory or in a file, and more where <see cref="MemoryPlan"/> finds room. At work in
/// backward: one layer, of which only attention sees all rows. The MLP and the LM head hold one mini-sequence (arXiv 2407.15892).
/// For one thread at a time.
/// </remarks>
public sealed class CausalLM : nn.Module<Tensor, Tensor>
{
    private static readonly (string Name, string[] Parts)[] s_fused = [("qkv_proj.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"]), ("gate_up_proj.weight", ["gate_proj.weight", "up_proj.weight"])];

    private readonly TokenEmbedding _embedding;
    private readonly DecoderLayer[] _layers;
    private readonly RmsNorm _norm;
    private readonly Projection _head;
    private readonly RotaryEmbedding _rotary;
    private readonly double _embeddingScale;

    /// <summary>A model with new weights, normal with <see cref="DecoderConfig.InitializerRange"/>, from torch's random state.</summary>
    public CausalLM(DecoderConfig config, ScalarType dtype = ScalarType.Float32, Device? device = null) : this(config, dtype, device, initialize: true)
    {
    }

    internal CausalLM(DecoderConfig config, ScalarType dtype, Device? device, bool initialize) : base(nameof(CausalLM))
    {
        (Config, DType, Device) = (config.Validated("the configuration"), dtype, device ?? CPU);
        _embeddingScale = ScaleOf(config, dtype);
        _embedding = new TokenEmbedding(Uninitialized.Matrix(config.VocabSize, config.HiddenSize, dtype, device));
        _layers = [.. Enumerable.Range(0, config.NumHiddenLayers).Select(l => new DecoderLayer(config, l, dtype, device))];
        _norm = new RmsNorm(config.HiddenSize, config.RmsNormEps, dtype, device, config.RmsNormUnitOffset);
        _head = config.TieWordEmbeddings ? new Projection(_embedding.Weight) : Uninitialized.Projection(config.HiddenSize, config.VocabSize, false, dtype, device);
        _rotary = new RotaryEmbedding(config.HeadDim, config.RopeTheta, dtype, device, config.RopeScaling);
        register_module("model", new ModuleGroup(("embed_tokens", _embedding), ("layers", new ModuleGroup([.. _layers.Select((l, i) => ($"{i}", (nn.Module)l))])), ("norm", _norm)));
        register_module("lm_head", _head); // a tied one has no parameter of its own, but may have an adapter
        if (initialize) Initialize();
    }

    /// <summary>Shape of the model.</summary>
    public DecoderConfig Config { get; }

    /// <summary>Type of the weights and of the computation.</summary>
    public ScalarType DType { get; }

    /// <summary>Where the weights are.</summary>
    public Device Device { get; }

    /// <summary>The adapter that the model carries (<see cref="LoraExtensions"/>), or null. Its dropout acts in <see cref="ForwardBackward"/> while the model is in training mode.</summary>
    public LoraConfig? Adapter { get; internal set; }

    internal IReadOnlyList<DecoderLayer> Layers => _layers;

    internal TokenEmbedding Embedding => _embedding;

    internal Projection Head => _head;

    internal RotaryEmbedding Rotary => _rotary;

    /// <summary>Logits [batch, S, V] of ids [batch, S], without gradients: for a look at a short text.</summary>
    public override Tensor forward(Tensor input)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        using var batch = new TokenBatch([.. Enumerable.Range(0, (int)input.size(0)).Select(b => new TokenSequence(input[b].data<long>().ToArray()))], Device);
        CheckIds(batch.InputIds);
        var logits = Logits(Hidden(batch, new ComputeOptions(), default));
        return logits.view(input.size(0), input.size(1), -1).MoveToOuterDisposeScope();
    }

    /// <summary>The loss of a batch and, added to every trained parameter's <c>.grad</c>, the gradients of scale · Σ loss.</summary>
    /// <param name="batch">Packed documents.</param>
    /// <param name="scale">1 / (targets of all micro-batches of the step) makes the gradient of the exact mean.</param>
    /// <param name="options">Chunk size and what to keep.</param>
    /// <param name="cancellationToken">Looked at before each layer; gradients are then incomplete. With <paramref name="completed"/> in forward only, so that nothing is left half changed.</param>
    /// <param name="completed">Called for the head with the last norm, for each layer from the last to the first, and for the embedding, to which a tied head's weight belongs.</param>
    /// <returns>Loss sum and targets; with no target at all the loss is 0 and no gradient is touched.</returns>
    /// <exception cref="ArgumentException">A token or label is outside the vocabulary.</exception>
    /// <exception cref="IOException"><see cref="ComputeOptions.OffloadFolder"/> is not there, may not be written to or is full.</exception>
    public TokenLoss ForwardBackward(TokenBatch batch, double scale, ComputeOptions? options = null, CancellationToken cancellationToken = default, GradientsCompleted? completed = null)
    {
        options ??= new ComputeOptions();
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var targets = Targets(batch);
        if (targets.numel() == 0) return new TokenLoss(zeros([], ScalarType.Float64).MoveToOuterDisposeScope(), 0);
        var wanted = WantedRows.From(targets, batch.Lengths);
        var shape = new BatchShape(batch.RowCount, targets.numel(), wanted?.Rows.numel() ?? batch.RowCount, batch.Lengths.Max(), batch.Lengths.Count);
        var plan = new MemoryPlan(Config, shape, DType, options, new TrainingMemory { Adapter = Adapter }, device: Device);
        DropoutRows? dropout = Adapter is { LoraDropout: > 0 } && training ? DropoutRows.NewPass() : null;
        var rows = Rows(batch, plan.ChunkRows) with { Dropout = dropout };
        using var store = OffloadStore.Create(options.OffloadFolder, (long)_layers.Length * batch.RowCount * Config.HiddenSize * DType.ElementSize(), Device);
        var records = new Stack<LayerRecord>();
        try
        {
            var x = Embed(batch.InputIds);
            foreach (var (layer, policy) in _layers.Zip(plan.Layers))
            {
                cancellationToken.ThrowIfCancellationRequested();
                var record = new LayerRecord(x, policy);
                records.Push(record);
                x = layer.Forward(x, rows, (q, k, v) => Attend(layer, record, q, k, v), record, wanted: OfLast(layer, wanted));
                record.Offload(store);
            }
            var (loss, gradient) = HeadForwardBackward(x, wanted?.Places(targets) ?? targets, batch.Targets.index_select(0, targets), scale, plan.LogitRows, options.GradientFilter, dropout);
            x.Dispose();
            Complete(_head.parameters().Concat(_norm.parameters()).Where(p => !ReferenceEquals(p, _embedding.Weight)));
            foreach (var layer in _layers.Reverse())
            {
                if (completed is null) cancellationToken.ThrowIfCancellationRequested();
                using (var record = records.Pop())
                {
                    record.Restore(store);
                    gradient = layer.Backward_(record, gradient, rows, batch.Lengths, OfLast(layer, wanted));
                }
                Complete(layer.parameters());
            }
            _embedding.Backward(batch.InputIds, Config.ScaleEmbeddings ? gradient.mul_(_embeddingScale) : gradient);
            Complete(_embedding.parameters());
            return new TokenLoss(loss.MoveToOuterDisposeScope(), targets.numel());

            void Complete(IEnumerable<Parameter> parameters) => completed?.Invoke(loss, [.. parameters.Where(p => p.requires_grad)]);
        }
        finally
        {
            foreach (var record in records) record.Dispose(); // none but after an exception
        }

        Tensor Attend(DecoderLayer layer, LayerRecord record, Tensor q, Tensor k, Tensor v)
        {
            var result = layer.Attend(q, k, v, batch.Lengths, OfLast(layer, wanted));
            var output = result.Output.alias();
            record.KeepAttention(result);
            return output;
        }
    }

    /// <summary>The score of a batch, without gradients.</summary>
    public TokenScore Evaluate(TokenBatch batch, ComputeOptions? options = null, CancellationToken cancellationToken = default)
    {
        options ??= new ComputeOptions();
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var targets = Targets(batch);
        if (targets.numel() == 0) return default;
        var wanted = WantedRows.From(targets, batch.Lengths);
        var x = Hidden(batch, options, cancellationToken, wanted);
        var (places, labels) = (wanted?.Places(targets) ?? targets, batch.Targets.index_select(0, targets));
        var (loss, correct) = (zeros([], ScalarType.Float64, Device), zeros([], ScalarType.Int64, Device));
        Chunking.ForEach(targets.numel(), Chunking.LogitRows(options.ChunkSize, targets.numel(), Config.VocabSize, DType), (start, count) =>
        {
            var (chunkLoss, chunkCorrect) = LinearCrossEntropy.Score(_norm.forward(x.index_select(0, places.narrow(0, start, count))), _head, labels.narrow(0, start, count), Config.FinalLogitSoftcapping);
            loss.add_(chunkLoss);
            correct.add_(chunkCorrect);
        });
        return new TokenScore(loss.item<double>(), targets.numel(), correct.item<long>());
    }

    /// <summary>x [.., d] of ids [..]. Recorded where gradients are on.</summary>
    internal Tensor Embed(Tensor ids) => Config.ScaleEmbeddings ? _embedding.forward(ids).mul_(_embeddingScale) : _embedding.forward(ids);

    /// <summary>What the head reads, [rows, d]: the last layer's output under the last norm. Records no graph.</summary>
    internal Tensor HeadInput(TokenBatch batch, ComputeOptions? options = null)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        return _norm.forward(Hidden(batch, options ?? new ComputeOptions(), default)).MoveToOuterDisposeScope();
    }

    /// <summary>Logits [.., V] of the last layer's output [.., d]. Recorded where gradients are on.</summary>
    internal Tensor Logits(Tensor x)
    {
        var logits = _head.forward(_norm.forward(x));
        return Config.FinalLogitSoftcapping is { } cap ? (logits / cap).tanh() * cap : logits;
    }

    // √d, rounded as the embeddings are.
    private static double ScaleOf(DecoderConfig config, ScalarType dtype)
    {
        using var exact = tensor(Math.Sqrt(config.HiddenSize));
        using var rounded = exact.to(dtype);
        using var wide = rounded.to(ScalarType.Float64);
        return wide.item<double>();
    }

    // norm → LM head → loss and all the way back to the last layer's output, on its rows that have a target, a mini-sequence at a time.
    private (Tensor Loss, Tensor Gradient) HeadForwardBackward(Tensor x, Tensor targets, Tensor labels, double scale, long logitRows, double? gradientFilter, DropoutRows? dropout)
    {
        using var scope = NewDisposeScope();
        var loss = zeros([], ScalarType.Float64, Device);
        var gradient = zeros_like(x);
        Chunking.ForEach(targets.numel(), logitRows, (start, count) =>
        {
            var at = targets.narrow(0, start, count);
            var h = x.index_select(0, at);
            var (chunkLoss, dn) = LinearCrossEntropy.Chunk(_norm.forward(h), _head, labels.narrow(0, start, count), scale, softcap: Config.FinalLogitSoftcapping, dropout: dropout?.From(start), gradientFilter: gradientFilter);
            loss.add_(chunkLoss);
            gradient.index_copy_(0, at, _norm.Backward(h, dn!));
        });
        return (loss.MoveToOuterDisposeScope(), gradient.MoveToOuterDisposeScope());
    }

    // The last layer's output [wanted, d], in one buffer with all before it.
    private Tensor Hidden(TokenBatch batch, ComputeOptions options, CancellationToken cancellationToken, WantedRows? wanted = null)
    {
        using var scope = NewDisposeScope();
        var rows = Rows(batch, Chunking.Rows(options.ChunkSize, batch.RowCount, Config.IntermediateSize, DType));
        var x = Embed(batch.InputIds);
        foreach (var layer in _layers)
        {
            cancellationToken.ThrowIfCancellationRequested();
            var asked = OfLast(layer, wanted);
            x = layer.Forward(x, rows, (q, k, v) => layer.Attend(q, k, v, batch.Lengths, asked).Output, inPlace: true, wanted: asked);
        }
        return x.MoveToOuterDisposeScope();
    }

    // What the head does not read of the last layer is not computed; all rows of the others are read.
    private WantedRows? OfLast(DecoderLayer layer, WantedRows? wanted) => layer == _layers[^1] ? wanted : null;

    private Tensor Targets(TokenBatch batch)
    {
        CheckIds(batch.InputIds);
        return LinearCrossEntropy.ValidRows(batch.Targets, Config.VocabSize);
    }

    internal void CheckIds(Tensor ids)
    {
        using var scope = NewDisposeScope();
        long lowest = ids.min().item<long>(), highest = ids.max().item<long>();
        if (lowest < 0 || highest >= Config.VocabSize)
            throw new ArgumentException($"Token id {(lowest < 0 ? lowest : highest)} is outside the vocabulary 0..{Config.VocabSize - 1} of this model: is the tokenizer the model's own?");
    }

    private RowContext Rows(TokenBatch batch, long chunkRows) => new(batch.Positions, batch.Lengths.Max(), _rotary, chunkRows);

    private void Initialize()
    {
        using var noGrad = no_grad();
        foreach (var (_, parameter) in named_parameters())
            if (parameter.dim() == 2) parameter.normal_(0, Config.InitializerRange);
    }

    /// <summary>
    /// What a checkpoint's file holds: a tensor's name there, and the parameters whose rows make it up. One for most; Phi-3 has q, k, v in one
    /// tensor, and gate and up. An adapter has a file of its own.
    /// </summary>
    internal IEnumerable<(string Name, IReadOnlyList<Parameter> Parts)> CheckpointTensors()
    {
        var all = named_parameters().Where(p => !p.name.Contains(".lora_", StringComparison.Ordinal)).ToDictionary(p => p.name, p => p.parameter);
        foreach (var (name, parameter) in all)
        {
            int split = name.LastIndexOf('.', name.LastIndexOf('.') - 1) + 1; // model.layers.0.self_attn. | q_proj.weight
            var (group, module) = (name[..split], name[split..]);
            var fused = Config.FusedProjections ? s_fused.FirstOrDefault(f => f.Parts.Contains(module)) : default;
            if (fused.Parts is null) yield return (name, [parameter]);
            else if (module == fused.Parts[0]) yield return (group + fused.Name, [.. fused.Parts.Select(part => all[group + part])]);
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing) _rotary.Dispose();
        base.Dispose(disposing);
    }
}
