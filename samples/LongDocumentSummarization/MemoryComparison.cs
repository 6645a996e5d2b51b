using MiniSeq.Layers;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace LongDocumentSummarization;

/// <summary>Measures what one training step over a document takes beyond weights, gradients and optimizer state, the three ways.</summary>
internal static class MemoryComparison
{
    public static void Print(CausalLM model, TokenSequence document)
    {
        if (!TensorMemory.StartCounting())
        {
            Console.WriteLine("Peak memory is not measured on this system.");
            return;
        }
        Console.WriteLine($"\nPeak memory of a training step over the longest document, {document.Length:N0} tokens, beyond weights and gradients (measured):");
        long ours = Measure(model, () => MiniSequence(model, document));
        Row("mini-sequence (this library)", ours, ours);
        // The plain forms hold three tensors of length × vocabulary: only run them where they fit.
        long logits = 3L * document.Length * model.Config.VocabSize * sizeof(float);
        foreach (bool recompute in new[] { true, false })
        {
            string name = recompute ? "activation recomputation only" : "plain TorchSharp";
            if (2 * logits > TensorMemory.AvailableBytes) Console.WriteLine($"  {name,-32} not run: its logits alone need {logits / 1e6:N0} MB, and {TensorMemory.AvailableBytes / 1e6:N0} MB are free");
            else Row(name, Measure(model, () => Plain(model, document, recompute)), ours);
        }
    }

    private static void Row(string name, long bytes, long ours) => Console.WriteLine($"  {name,-32} {bytes / 1e6,8:N0} MB   {(double)bytes / ours,5:N1}×");

    private static long Measure(CausalLM model, Action step)
    {
        foreach (var p in model.parameters())
        {
            using var zero = zeros_like(p);
            p.grad = zero;
        }
        long before = TensorMemory.LiveBytes;
        TensorMemory.ResetPeak();
        step();
        foreach (var p in model.parameters()) p.grad = null;
        return TensorMemory.PeakBytes - before;
    }

    private static void MiniSequence(CausalLM model, TokenSequence document)
    {
        using var batch = new TokenBatch([document]);
        // The least memory; training itself keeps more where there is room, to compute less.
        model.ForwardBackward(batch, 1.0 / document.TargetCount, new ComputeOptions(Recompute: RecomputePolicy.Full)).Dispose();
    }

    private static void Plain(CausalLM model, TokenSequence document, bool recompute)
    {
        using var scope = NewDisposeScope();
        var loss = PlainDecoder.LossSum(model, tensor(document.InputIds).unsqueeze(0), tensor(document.Labels).unsqueeze(0), recompute);
        (loss / document.TargetCount).backward();
    }
}
