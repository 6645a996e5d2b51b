namespace MiniSeq.MLNet;

/// <summary>How well a causal language model predicts the label texts of a data view.</summary>
public sealed class CausalLMMetrics
{
    internal CausalLMMetrics(double loss, double accuracy, long tokens) => (Loss, TokenAccuracy, TokenCount) = (loss, accuracy, tokens);

    /// <summary>Mean −log p of a label token, in nats.</summary>
    public double Loss { get; }

    /// <summary>exp(loss).</summary>
    public double Perplexity => Math.Exp(Loss);

    /// <summary>Share of label tokens that the model holds likeliest, in [0, 1].</summary>
    public double TokenAccuracy { get; }

    /// <summary>Label tokens, over which the other figures are means.</summary>
    public long TokenCount { get; }

    /// <summary>All figures on one line.</summary>
    public override string ToString() => string.Create(System.Globalization.CultureInfo.InvariantCulture, $"loss {Loss:F4}, perplexity {Perplexity:F3}, token accuracy {TokenAccuracy:F4} over {TokenCount} tokens");
}
