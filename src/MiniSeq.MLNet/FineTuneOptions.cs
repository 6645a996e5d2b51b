using Microsoft.ML;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>Options of <see cref="MiniSeqCatalog.FineTune(FineTuneOptions)"/>.</summary>
public sealed class FineTuneOptions
{
    /// <summary>Column of the document, or of the dialogue: see <see cref="ChatTemplate"/>.</summary>
    public string InputColumnName { get; set; } = "Document";

    /// <summary>Column of the text to learn to write; null learns the input text itself, without <see cref="PromptTemplate"/>.</summary>
    public string? LabelColumnName { get; set; } = "Summary";

    /// <summary>Column that gets the generated text.</summary>
    public string OutputColumnName { get; set; } = "GeneratedText";

    /// <summary>Folder of the Hugging Face checkpoint to start from: config.json, model.safetensors, tokenizer.json. Either this or <see cref="Config"/>.</summary>
    public string? Model { get; set; }

    /// <summary>Shape of a new model with random weights. Either this, with <see cref="Tokenizer"/>, or <see cref="Model"/>.</summary>
    public DecoderConfig? Config { get; set; }

    /// <summary>Tokenizer of a new model, which names its first and last token of a text. A checkpoint brings its own.</summary>
    public HuggingFaceTokenizer? Tokenizer { get; set; }

    /// <summary>Trains a LoRA adapter of the checkpoint, which itself stays as it is; null trains all weights.</summary>
    public LoraConfig? Lora { get; set; }

    /// <summary>The type in which the model computes.</summary>
    public Precision Precision { get; set; }

    /// <summary>Text around the document, with <c>{input}</c> once; the label follows it.</summary>
    public string PromptTemplate { get; set; } = "{input}\n\nSummary:\n";

    /// <summary>
    /// How the model reads dialogues; null trains on plain text. Without a label column the input column holds dialogues, each the JSON text
    /// of Hugging Face's messages, <c>[{"role": "user", "content": "…"}, …]</c>, and every answer is learned; the model writes the next answer, or
    /// the last one anew where the dialogue ends with it. With a label column a row is a dialogue of two turns: the document in
    /// <see cref="PromptTemplate"/> is the user's, the label the assistant's.
    /// </summary>
    public ChatTemplateKind? ChatTemplate { get; set; }

    /// <summary>The most tokens of a sequence: a longer document is cut, the label and the assistant's turns never. Null takes the model's max_position_embeddings.</summary>
    public int? MaxLength { get; set; }

    /// <summary>Whether only the label's tokens, or the assistant's, are learned, or the prompt's too.</summary>
    public bool CompletionOnlyLoss { get; set; } = true;

    /// <summary>How to train. Its seed is not used: <see cref="Seed"/> is.</summary>
    public TrainingOptions Training { get; set; } = new();

    /// <summary>Seed of new weights and of the order of rows; null derives one from the seed of the <see cref="MLContext"/>.</summary>
    public int? Seed { get; set; }

    /// <summary>How <c>Transform</c> writes. Sampling without a seed of its own takes the training's.</summary>
    public GenerationOptions Generation { get; set; } = new();

    /// <summary>Rows that <c>Transform</c> gives to the model at a time. Sampled texts are drawn one by one, so that they do not depend on their neighbours.</summary>
    public int InferenceBatchSize { get; set; } = 4;

    /// <summary>Rows to evaluate on, with the columns of the training rows.</summary>
    public IDataView? ValidationSet { get; set; }

    /// <summary>
    /// Folder to write the weights, or the adapter, to when the model is saved, absolute or relative: to the zip file for <c>mlContext.MiniSeq().Save</c>,
    /// to the current directory for <c>mlContext.Model.Save</c>, which does not tell where the file is. Null is <c>miniseq-model-</c> and the
    /// beginning of the SHA-256 of what is in it.
    /// </summary>
    public string? WeightsFolder { get; set; }

    /// <summary>Told what the log is told.</summary>
    public IProgress<TrainingProgress>? Progress { get; set; }

    /// <summary>Ends <c>Fit</c> with an <see cref="OperationCanceledException"/>; nothing of the model is left.</summary>
    public CancellationToken CancellationToken { get; set; }

    internal FineTuneOptions Copy() => (FineTuneOptions)MemberwiseClone();

    internal void Validate()
    {
        ArgumentException.ThrowIfNullOrEmpty(InputColumnName);
        ArgumentException.ThrowIfNullOrEmpty(OutputColumnName);
        if (LabelColumnName is "") throw new ArgumentException("LabelColumnName is empty; null learns the input text itself.", nameof(LabelColumnName));
        if (Model is null == Config is null) throw new ArgumentException("Give either Model, the folder of a checkpoint to start from, or Config, the shape of a new model.", nameof(Model));
        if (Config is null != Tokenizer is null) throw new ArgumentException("Tokenizer goes with Config, a new model; a checkpoint brings its own.", nameof(Tokenizer));
        if (Lora is not null && Model is null) throw new ArgumentException("Lora goes with Model: an adapter of random weights is of no use.", nameof(Lora));
        Lora?.Validate();
        ArgumentNullException.ThrowIfNull(PromptTemplate);
        ArgumentNullException.ThrowIfNull(Training);
        ArgumentNullException.ThrowIfNull(Generation);
        if (PromptTemplate.Split(DocumentEncoder.InputPlaceholder).Length != 2)
            throw new ArgumentException($"PromptTemplate must hold {DocumentEncoder.InputPlaceholder} once; it is \"{PromptTemplate}\".", nameof(PromptTemplate));
        if (MaxLength is <= 0) throw new ArgumentOutOfRangeException(nameof(MaxLength), MaxLength, "MaxLength must be positive, or null.");
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(InferenceBatchSize);
        Training.Validate();
        if (Config is not null) CheckTokenizer(Config, Tokenizer!);
    }

    // After saving, the tokenizer's special tokens are those of the folder, config.json's among them: the two must not contradict each other.
    private static void CheckTokenizer(DecoderConfig config, HuggingFaceTokenizer tokenizer)
    {
        if (tokenizer.VocabSize > config.VocabSize)
            throw new ArgumentException($"The tokenizer has {tokenizer.VocabSize} tokens and Config makes room for {config.VocabSize} (VocabSize).", nameof(Config));
        int[] contradicted = [.. config.EosTokenIds.Where(id => !tokenizer.EosTokenIds.Contains(id)), .. config.BosTokenId is { } bos && bos != tokenizer.BosTokenId ? new[] { bos } : []];
        if (contradicted.Length > 0)
            throw new ArgumentException($"Config names the special tokens {string.Join(", ", contradicted)} and the tokenizer does not: load it from a folder whose tokenizer_config.json names bos_token and eos_token, and leave them out of Config.", nameof(Config));
    }
}
