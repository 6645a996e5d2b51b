using MiniSeq.Layers;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// The memory of the same step as a user of TorchSharp would write it (<see cref="PlainDecoder"/>): what autograd saves, tensor by tensor, with
/// or without recomputation of each whole layer. The baselines that <see cref="MemoryPlan"/> is compared with.
/// </summary>
/// <remarks>
/// On the CPU, where plain attention is libtorch's flash kernel; with a window or capped scores it holds all scores, as it does in Hugging Face's
/// eager form. Gradients have the type that autograd gives them, that of the weights, but where they are accumulated: there it is float32, as in
/// <see cref="MemoryPlan"/>, and autograd's own is there besides.
/// </remarks>
public sealed class PlainMemoryPlan
{
    private readonly DecoderConfig _config;
    private readonly BatchShape _batch;
    private readonly bool _recompute;
    private readonly TrainingMemory _training;
    private readonly ParameterCounts _parameters;
    private readonly long _element;
    private readonly long _wide;
    private readonly long _d;
    private readonly long _inner;
    private readonly long _queries;
    private readonly long _keys;

    /// <summary>The plan of a step.</summary>
    /// <param name="config">The model.</param>
    /// <param name="batch">Documents of one length: the plain form has no other batches.</param>
    /// <param name="dtype">Type of the weights and of the computation.</param>
    /// <param name="recompute">Whether each layer keeps its input only (activation recomputation).</param>
    /// <param name="training">As in <see cref="MemoryPlan"/>.</param>
    /// <exception cref="ArgumentOutOfRangeException">No row.</exception>
    public PlainMemoryPlan(DecoderConfig config, BatchShape batch, ScalarType dtype, bool recompute, TrainingMemory? training = null)
    {
        batch.Validate();
        (_config, _batch, _recompute, _training) = (config, batch, recompute, training ?? new TrainingMemory());
        _parameters = new ParameterCounts(config, dtype, _training.Adapter);
        (_element, _wide) = (dtype.ElementSize(), Gradients.AccumulationType(dtype).ElementSize());
        (_d, _inner) = (config.HiddenSize, config.IntermediateSize);
        (_queries, _keys) = ((long)config.NumAttentionHeads * config.HeadDim, (long)config.NumKeyValueHeads * config.HeadDim);
    }

    /// <summary>Predicted peak beyond weights, gradients and optimizer state, in bytes.</summary>
    public long PeakBytes => Stages.Max(s => s.Bytes);

    /// <summary>Weights, and adapters where there are any, in bytes.</summary>
    public long WeightBytes => _training.WeightBytes(_parameters);

    /// <summary>Moments and master copies of the optimizer, in bytes.</summary>
    public long OptimizerBytes => _training.OptimizerBytes(_parameters);

    /// <summary>Predicted peak of the whole step, in bytes.</summary>
    public long TotalBytes => _training.TotalBytes(_parameters, Stages, Accumulates || _parameters.IsAdapted ? _wide : _element);

    private bool Accumulates => _training.GradientLifetime == GradientLifetime.Accumulated;

    private IEnumerable<StepStage> Stages
    {
        get
        {
            long always = (3 * sizeof(long) * _batch.Rows) + (_batch.LongestDocument * _config.HeadDim * _element);
            long kept = Enumerable.Range(0, _config.NumHiddenLayers).Sum(Kept);
            yield return new(_parameters.Head + 1, always + kept + LastNorm + Loss); // no gradient yet
            yield return new(_parameters.Head, always + kept + LastNorm + Row(2L * _config.VocabSize) + Autograd(_parameters.Vocabulary));
            for (int l = _config.NumHiddenLayers - 1; l >= 0; l--)
            {
                yield return new(l + 1, always + kept + (_recompute ? Graph(l) : 0) + Math.Max(Forward(l), Backward(l)));
                kept -= Kept(l);
            }
            yield return new(0, always + Row(_d) + Autograd(_parameters.Vocabulary));
        }
    }

    private long Kept(int layer) => _recompute ? Row(_d) : Graph(layer);

    private long Row(long width) => _batch.Rows * width * _element;

    private long WideRow(long width) => _batch.Rows * width * _wide;

    // What autograd saves of one layer.
    private long Graph(int layer) => (2 * (Norm(_d) + Row(_d))                   // both norms, and what they give
        + (_config.PostNorms ? 2 * Norm(_d) : 0)
        + (_config.QkNorm ? Norm(_queries) + Norm(_keys) : 0)
        + Row(_config.HeadDim)                                                    // cos and sin
        + Row(_queries + (2 * _keys))                                             // q and k after rotation, v
        + (IsEager(layer) ? EagerSaved : WideRow(_config.NumAttentionHeads))
        + Row(_queries)                                                           // attention's output
        + Row(4 * _inner)                                                         // gate, its activation, up, their product
        + AdapterRows);

    // x in float32 (x itself, where it is), the inverse root, and x normed, before rounding with a unit offset, which the weight's gradient needs.
    private long Norm(long width) => WideRow(width) + WideRow(width == _d ? 1 : width / _config.HeadDim)
        + (_config.RmsNormUnitOffset ? WideRow(width) : _parameters.IsAdapted ? 0 : Row(width));

    // s x A^T of each of the adapters of a layer.
    private long AdapterRows => _parameters.IsAdapted ? Row(7L * _training.Adapter!.R) : 0;

    private bool IsEager(int layer) => _config.WindowOf(layer) is not null || _config.AttnLogitSoftcapping is not null;

    private long Scores(long element) => _batch.Rows * _batch.LongestDocument * _config.NumAttentionHeads * element;

    // Repeated keys and values, tanh of the scores where they are capped, the softmax in float32, and rounded where the type is narrower; the mask.
    private long EagerSaved => Row(2 * _queries) + (_config.AttnLogitSoftcapping is null ? 0 : Scores(_element)) + Scores(_wide) + (_wide == _element ? 0 : Scores(_element)) + (_batch.LongestDocument * _batch.LongestDocument);

    // Beside what is saved: the scores as a product, scaled, masked, and capped in two more steps, when the MLP has not yet begun; else q and k before
    // rotation and the MLP's output, when it has.
    private long Forward(int layer) => IsEager(layer)
        ? ((_config.AttnLogitSoftcapping is null ? 3 : 5) * Scores(_element)) - Row((4 * _inner) + _d) - Norm(_d)
        : Row((2 * _queries) + _d);

    // The gradient of the layer's output and the residual's; then either two of the MLP's, or those of the softmax and of the scores.
    private long Backward(int layer) => Row(2 * _d) + Math.Max(Row((_parameters.IsAdapted ? 4 : 2) * _inner) + Autograd(_inner * _d),
        IsEager(layer) ? (2 * Scores(_wide)) - Row(4 * _inner) : 0);

    // Its input, what it saves and what it gives.
    private long LastNorm => Norm(_d) + Row(2 * _d);

    // Backward: the log-softmax, its gradient and that of the logits, all float32. Forward: logits, the same in float32, their log-softmax; capped ones in three more steps.
    private long Loss
    {
        get
        {
            bool capped = _config.FinalLogitSoftcapping is not null;
            long forward = Row((capped ? 4 : 1) * _config.VocabSize) + WideRow((_wide == _element ? 1 : 2) * _config.VocabSize);
            long backward = WideRow(3 * _config.VocabSize) + (capped ? Row(_config.VocabSize) : 0);
            return Math.Max(forward, backward);
        }
    }

    // Autograd's own gradient of a weight of so many numbers, and its copy in the type in which they are accumulated.
    private long Autograd(long numbers) => _parameters.IsAdapted || !Accumulates ? 0 : numbers * (_element + (_wide == _element ? 0 : _wide));
}
