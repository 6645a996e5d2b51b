using MiniSeq.MLNet;

// ML.NET's own packages put their entry points here, so that `using Microsoft.ML` is enough to find them.
namespace Microsoft.ML;

/// <summary>The entry point of MiniSeq in ML.NET.</summary>
public static class MiniSeqMLContextExtensions
{
    /// <summary>Fine-tuning and use of causal language models on very long documents.</summary>
    /// <param name="mlContext">Its seed, GPU settings and log are used.</param>
    public static MiniSeqCatalog MiniSeq(this MLContext mlContext)
    {
        ArgumentNullException.ThrowIfNull(mlContext);
        return new MiniSeqCatalog(mlContext);
    }
}
