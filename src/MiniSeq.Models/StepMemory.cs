using MiniSeq.Layers;
using MiniSeq.Layers.Kernels;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// What <see cref="CausalLM.ForwardBackward"/> holds at each stage of backward, in bytes. Forward needs no stage: whatever it holds at a layer, the
/// backward of that layer holds, too, and the gradient besides.
/// </summary>
/// <remarks>Written S rows, r rows whose output is wanted (all but in the last layer), c rows of a chunk, d hidden, I intermediate, V vocabulary, Q and K the widths of all query and key heads.</remarks>
internal sealed record StepMemory
{
    private readonly DecoderConfig _config;
    private readonly BatchShape _batch;
    private readonly bool _offload;
    private readonly Scratch _scratch;
    private readonly long _element; // bytes
    private readonly long _wide;    // the same in float32 or better
    private readonly long _d;
    private readonly long _queries;
    private readonly long _keys;

    public StepMemory(DecoderConfig config, BatchShape batch, ScalarType dtype, ComputeOptions options, LoraConfig? adapter, Device? device)
    {
        (_config, _batch, _offload, DType) = (config, batch, options.OffloadFolder is not null, dtype);
        _scratch = new Scratch(dtype, device);
        (_element, _wide) = (dtype.ElementSize(), Gradients.AccumulationType(dtype).ElementSize());
        (_d, _queries, _keys) = (config.HiddenSize, (long)config.NumAttentionHeads * config.HeadDim, (long)config.NumKeyValueHeads * config.HeadDim);
        Parameters = new ParameterCounts(config, dtype, adapter);
        ChunkRows = Chunking.Rows(options.ChunkSize, batch.Rows, config.IntermediateSize, dtype);
        LogitRows = Chunking.LogitRows(options.ChunkSize, Math.Max(1, batch.Targets), config.VocabSize, dtype);
    }

    public ScalarType DType { get; }

    public ParameterCounts Parameters { get; }

    /// <summary>Rows of a mini-sequence in the layers: of the automatic size, or the one asked for.</summary>
    public long ChunkRows { get; init; }

    /// <summary>The same in the LM head.</summary>
    public long LogitRows { get; init; }

    /// <summary>From the head over the layers to the embedding.</summary>
    public IEnumerable<StepStage> Stages(IReadOnlyList<RecomputePolicy> policies)
    {
        long kept = (_offload ? Input : 0) + Enumerable.Range(0, policies.Count).Sum(l => Kept(l, policies[l]));
        yield return new(Parameters.Head, Always + kept + Head);
        for (int l = policies.Count - 1; l >= 0; l--)
        {
            yield return new(l + 1, Always + kept + Backward(l, policies[l]));
            kept -= Kept(l, policies[l]);
        }
        yield return new(0, Always + Embedding);
    }

    private long Input => _batch.Rows * _d * _element;

    // Ids, positions and targets of all rows; where the targets are, in two forms, and their labels; the wanted rows; the rotary tables.
    private long Always => sizeof(long) * ((3 * _batch.Rows) + (3 * _batch.Targets) + (_batch.WantedRows < _batch.Rows ? _batch.WantedRows : 0)) + (_batch.LongestDocument * _config.HeadDim * _element);

    private long RowsOf(int layer) => layer == _config.NumHiddenLayers - 1 ? _batch.WantedRows : _batch.Rows;

    private long LogSumExp(long rows) => rows * _config.NumAttentionHeads * _wide;

    private long Heads(long rows) => ((rows * _queries) + (2 * _batch.Rows * _keys)) * _element; // q, k, v, or their gradients

    // What a layer keeps from forward.
    private long Kept(int layer, RecomputePolicy policy)
    {
        long r = RowsOf(layer);
        long attention = (r * _queries * _element) + LogSumExp(r);
        return (_offload ? 0 : Input) + policy switch
        {
            RecomputePolicy.Full => 0,
            RecomputePolicy.KeepAttention => attention,
            _ => Heads(r) + attention + (r * (_d + (2L * _config.IntermediateSize)) * _element), // the residual, gate and up
        };
    }

    // The last layer's output and its gradient, and a chunk: its rows, their norm and gradient, the logits.
    private long Head => (2 * _batch.WantedRows * _d * _element) + (LogitRows * ((3 * _d) + _config.VocabSize) * _element)
        + Math.Max(Math.Max(_scratch.Softmax(LogitRows, _config), _scratch.HeadInput(LogitRows, _config)), Parameters.IsAdapted ? 0 : _scratch.Product(_config.VocabSize, _d, LogitRows));

    // The gradient of a layer's output turns into that of its input. Three phases, each of which may hold most.
    private long Backward(int layer, RecomputePolicy policy)
    {
        long r = RowsOf(layer), c = Math.Min(ChunkRows, r);
        bool partly = r < _batch.Rows;
        long output = r * _queries * _element;
        long recomputed = policy switch
        {
            RecomputePolicy.Full => Heads(r) + output + LogSumExp(r),
            RecomputePolicy.KeepAttention => Heads(r),
            _ => 0,
        };
        long own = partly ? r * _d * _element : 0; // the wanted rows of the input, picked out
        bool inPlace = _scratch.HasKernel && FlashKernel.Takes(_batch.LongestDocument * r / _batch.Rows, _config.HeadDim);
        // The gradient of attention's output; or Σ dy ⊙ y, when it takes the output's place, and dq, dk and dv those of q, k and v.
        long dOutput = inPlace ? r * _config.NumAttentionHeads * sizeof(float) : output;
        long mlp = recomputed + own + dOutput + Math.Max(MlpChunk(c, policy == RecomputePolicy.None), OutputChunk(c, inPlace));
        long attention = recomputed + own + dOutput + (inPlace ? FlashKernel.BackwardBytes(_batch.LongestDocument, _config.NumKeyValueHeads, _config.HeadDim) : Heads(r) + AttentionScratch(layer, r));
        long heads = inPlace && policy == RecomputePolicy.None ? 0 : Heads(r);
        // dq is done with, and as large as output, when the gradients of k and v go on.
        heads += partly ? Math.Max(own + HeadsChunk(c, _queries), Input + HeadsChunk(ChunkRows, _keys) - output) : HeadsChunk(c, _queries);
        return (r * _d * _element) + Math.Max(mlp, Math.Max(attention, heads));
    }

    // The residual, its norm and the gradient of that; at the last product what is made of gate and up, and then, when that is gone, a norm goes back; a norm behind the MLP while gate and up are there.
    private long MlpChunk(long c, bool kept)
    {
        // In backward gate, up (unless they are kept), and the hidden rows or their gradient, whose place the gradients of gate and up take, or which are
        // two more, beside a weight's gradient. In forward, which makes gate and up in any case, three and no gradient.
        bool inPlace = _scratch.HasKernel && _config.HiddenAct == Activation.Silu && _config.IntermediateSize % 16 == 0;
        long one = c * _config.IntermediateSize * _element;
        long there = kept ? 0 : 2, down = Weight(_d, _config.IntermediateSize, c, _config.MlpBias), gateUp = Weight(_config.IntermediateSize, _d, c, _config.MlpBias);
        long products = Math.Max(3 * one, (there * one) + (inPlace ? Math.Max(one + down, gateUp) : Math.Max((2 * one) + down, (3 * one) + gateUp)));
        long norm = c * ((_d * _scratch.NormBackward(_d)) + (_config.PostNorms && !kept ? 2L * _config.IntermediateSize * _element : 0));
        return (c * (_config.PostNorms ? 5 : 3) * _d * _element) + Math.Max(products, norm);
    }

    // Behind the MLP the way back through the norm and the product behind attention; beside its result, what the sum of it and the output takes.
    private long OutputChunk(long c, bool inPlace)
    {
        long sums = inPlace ? 2 * Math.Min(c, Chunking.FullSpeedRows) * _queries * sizeof(float) : 0;
        long product = Math.Max((c * _queries * _element) + sums, Weight(_d, _queries, c, _config.OutputBias));
        return _config.PostNorms ? Math.Max(c * _d * (_element + _scratch.NormBackward(_d)), (2 * c * _d * _element) + product) : product;
    }

    // The norm of the rows and its gradient; heads before their own norm and that norm's way back, and then its result beside a weight's gradient; or the norm's way back.
    private long HeadsChunk(long c, long width)
    {
        long weight = Weight(width, _d, c, _config.QkvBias);
        long heads = _config.QkNorm ? (c * width * _element) + Math.Max(c * width * _scratch.NormBackward(_config.HeadDim), (c * width * _element) + weight) : weight;
        return (2 * c * _d * _element) + Math.Max(heads, c * _d * _scratch.NormBackward(_d));
    }

    // Beside a product of c rows with a weight [m, n]: what accumulating its gradient takes, and its bias's; or the adapter's matrices in the
    // type of the rows, with what accumulating their gradients takes.
    private long Weight(long m, long n, long c, bool bias) => Parameters.IsAdapted
        ? (2 * Parameters.Trained(1) / 7 * _element) + Math.Max(_scratch.Product(m, Parameters.Rank, c), _scratch.Product(Parameters.Rank, n, c))
        : Math.Max(_scratch.Product(m, n, c), bias ? Scratch.Bias(c, m, DType) : 0);

    private long AttentionScratch(int layer, long r)
    {
        long length = _batch.LongestDocument, queries = Math.Max(1, r * length / _batch.Rows); // its share of the wanted rows
        long one = ((queries * _queries) + (2 * length * _keys)) * _element;
        long packed = _batch.Documents > 1 ? one : 0; // one document's gradients, before they are placed among all
        if (_config.AttnLogitSoftcapping is not null || _config.WindowOf(layer) < length)
            return packed + Scratch.Tiles(_config, queries, length, _config.WindowOf(layer), DType);
        return packed + Math.Max(Scratch.Flash(queries, length, DType), r < _batch.Rows ? one : 0); // of the keys before the wanted rows and of theirs, before they are one
    }

    // The gradient of the embeddings, which the weight's takes in its own type.
    private long Embedding => Input + (Parameters.IsAdapted || _wide == _element ? 0 : _batch.Rows * _d * _wide);
}
