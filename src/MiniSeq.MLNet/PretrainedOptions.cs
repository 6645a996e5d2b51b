using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>Options of <see cref="MiniSeqCatalog.LoadPretrained(PretrainedOptions)"/>.</summary>
public sealed class PretrainedOptions
{
    /// <summary>Folder of a Hugging Face checkpoint: config.json, model.safetensors, tokenizer.json.</summary>
    public string Model { get; set; } = "";

    /// <summary>Folder of a PEFT adapter for it: adapter_config.json, adapter_model.safetensors; null uses the checkpoint as it is.</summary>
    public string? Adapter { get; set; }

    /// <summary>The type in which the model computes.</summary>
    public Precision Precision { get; set; }

    /// <summary>Column of the document, or of the dialogue: see <see cref="FineTuneOptions.ChatTemplate"/>.</summary>
    public string InputColumnName { get; set; } = "Document";

    /// <summary>
    /// Column of the text wanted, for <c>Evaluate</c>; null evaluates on the input text itself. With a <see cref="ChatTemplate"/> it also says what the
    /// input column holds: documents where it is given, dialogues where it is null.
    /// </summary>
    public string? LabelColumnName { get; set; }

    /// <summary>Column that gets the generated text.</summary>
    public string OutputColumnName { get; set; } = "GeneratedText";

    /// <summary>Text around the document, with <c>{input}</c> once.</summary>
    public string PromptTemplate { get; set; } = DocumentEncoder.InputPlaceholder;

    /// <summary>How the model reads dialogues, as in <see cref="FineTuneOptions.ChatTemplate"/>; null takes the input as plain text.</summary>
    public ChatTemplateKind? ChatTemplate { get; set; }

    /// <summary>The most tokens of a prompt and what is written after it: a longer document is cut. Null takes the model's max_position_embeddings.</summary>
    public int? MaxLength { get; set; }

    /// <summary>How <c>Transform</c> writes.</summary>
    public GenerationOptions Generation { get; set; } = new();

    /// <summary>Rows that <c>Transform</c> gives to the model at a time.</summary>
    public int InferenceBatchSize { get; set; } = 4;

    /// <summary>Where the weights, or the adapter, are written when a pipeline with this model is saved, as in <see cref="FineTuneOptions.WeightsFolder"/>.</summary>
    public string? WeightsFolder { get; set; }

    // What is common to both ways of making a transformer is checked in one place.
    internal FineTuneOptions Checked()
    {
        ArgumentException.ThrowIfNullOrEmpty(Model);
        var options = new FineTuneOptions
        {
            Model = Model,
            Precision = Precision,
            InputColumnName = InputColumnName,
            LabelColumnName = LabelColumnName,
            OutputColumnName = OutputColumnName,
            PromptTemplate = PromptTemplate,
            ChatTemplate = ChatTemplate,
            MaxLength = MaxLength,
            Generation = Generation,
            InferenceBatchSize = InferenceBatchSize,
        };
        options.Validate();
        return options;
    }
}
