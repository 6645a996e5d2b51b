using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>One variant's model with gradients and optimizer state in place, ready to take steps. Everything that differs between variants is in <see cref="ForwardBackward"/>.</summary>
internal sealed class StepRunner : IDisposable
{
    private readonly Shape _shape;
    private readonly Variant _variant;
    private readonly CausalLM _model;
    private readonly FusedAdamW? _optimizer;
    private readonly ComputeOptions _compute;
    private long _shortest;

    public StepRunner(Shape shape, Variant variant, ScalarType dtype, bool optimizer, ComputeOptions compute)
    {
        (_shape, _variant, _compute) = (shape, variant, compute);
        random.manual_seed(1);
        _model = new CausalLM(shape.Config, dtype);
        if (shape.Lora > 0) _model.AddAdapter(new LoraConfig { R = shape.Lora, LoraAlpha = 2 * shape.Lora });
        // Gradients persist over steps, as they do under accumulation, and have one type in all variants.
        foreach (var p in Trained)
        {
            using var gradient = zeros(p.shape, Gradients.AccumulationType(p.dtype));
            p.grad = gradient;
        }
        if (optimizer)
        {
            _optimizer = new FusedAdamW(_model.parameters(), new TrainingOptions());
            _optimizer.Step(0); // makes its state
        }
        ForwardBackward(shape.Documents(16)); // code and threads are in the base, too
        BaseTensorBytes = TensorMemory.LiveBytes;
        BaseResidentBytes = TensorMemory.ResidentBytes;
        TensorMemory.ResetPeakResident();
    }

    /// <summary>Weights, gradients and optimizer state.</summary>
    public long BaseTensorBytes { get; }

    /// <summary>The same, as resident memory of the process, with the libraries.</summary>
    public long BaseResidentBytes { get; }

    public CausalLM Model => _model;

    /// <summary>One whole training step; the mean loss.</summary>
    public double Step(IReadOnlyList<TokenSequence> documents)
    {
        ZeroGradients();
        double loss = ForwardBackward(documents);
        Update();
        return loss;
    }

    /// <summary>The norm of all gradients, which are scaled down to 1.</summary>
    public void Clip() => _optimizer?.ClipGradNorm(1);

    public void Update() => _optimizer?.Step(1e-4);

    /// <summary>
    /// Largest bytes of tensors in a forward and backward over a length, over those of two tokens: what grows with the sequence.
    /// A passing second copy of a weight's gradient, as autograd makes it, is not part of it.
    /// </summary>
    public long GrowingTensorBytes(int seq)
    {
        if (_shortest == 0) _shortest = Peak(2);
        return Peak(seq) - _shortest;
    }

    /// <summary>The length at which the memory plan predicts that the budget is used up.</summary>
    public int PlannedLongest(long budgetBytes)
    {
        var training = new TrainingMemory { Adapter = _shape.Lora > 0 ? new LoraConfig { R = _shape.Lora } : null };
        return MemoryPlan.Longest(budgetBytes, seq =>
        {
            long rows = (long)seq * _shape.Batch;
            return new MemoryPlan(_shape.Config, new BatchShape(rows, rows, rows, seq, _shape.Batch), _model.DType, _compute, training).PeakBytes;
        });
    }

    private long Peak(int seq)
    {
        var documents = _shape.Documents(seq);
        ZeroGradients();
        TensorMemory.ResetPeak();
        ForwardBackward(documents);
        return TensorMemory.PeakBytes - BaseTensorBytes;
    }

    /// <summary>The mean loss; gradients are added up.</summary>
    public double ForwardBackward(IReadOnlyList<TokenSequence> documents)
    {
        using var scope = NewDisposeScope();
        long targets = documents.Sum(d => d.TargetCount);
        if (_variant == Variant.MiniSequence)
        {
            using var batch = new TokenBatch(documents);
            using var loss = _model.ForwardBackward(batch, 1.0 / targets, _compute);
            return loss.Mean;
        }
        Tensor Rows(Func<TokenSequence, long[]> part) => stack(documents.Select(d => tensor(part(d))));
        var sum = PlainDecoder.LossSum(_model, Rows(d => d.InputIds), Rows(d => d.Labels), _variant == Variant.Recompute);
        (sum / targets).backward();
        return sum.to(ScalarType.Float64).item<double>() / targets;
    }

    public void ZeroGradients()
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        foreach (var p in Trained) p.grad!.zero_();
    }

    private IEnumerable<Parameter> Trained => _model.parameters().Where(p => p.requires_grad);

    public void Dispose()
    {
        _optimizer?.Dispose();
        _model.Dispose();
    }
}
