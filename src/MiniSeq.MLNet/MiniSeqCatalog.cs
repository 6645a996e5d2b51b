using Microsoft.ML;
using Microsoft.ML.Runtime;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>What <c>mlContext.MiniSeq()</c> offers.</summary>
public sealed class MiniSeqCatalog
{
    private readonly MLContext _context;

    internal MiniSeqCatalog(MLContext context) => _context = context;

    /// <summary>
    /// More places to look for the weights of a loaded model, before all others: folders of models, or folders that hold these.
    /// The environment variable <c>MINISEQ_MODEL_PATH</c> adds one more.
    /// </summary>
    public static IReadOnlyList<string> ModelSearchPaths { get; set; } = [];

    /// <summary>Fine-tunes a Hugging Face checkpoint to write the label text after the input text.</summary>
    /// <param name="model">Folder with config.json, model.safetensors and tokenizer.json.</param>
    /// <param name="labelColumnName">Text to learn to write; null learns the input text itself.</param>
    /// <param name="inputColumnName">The document.</param>
    /// <param name="outputColumnName">Gets the generated text.</param>
    /// <param name="maxLength">The most tokens of prompt and label together: a longer document is cut, the label never; null takes the model's.</param>
    /// <param name="numTrainEpochs">Passes over the rows.</param>
    /// <param name="learningRate">The largest learning rate.</param>
    /// <param name="validationSet">Rows to evaluate on after each pass, with the same columns.</param>
    /// <exception cref="ArgumentException">A value is outside its range.</exception>
    public MiniSeqEstimator FineTune(string model, string? labelColumnName = "Summary", string inputColumnName = "Document", string outputColumnName = "GeneratedText",
        int? maxLength = null, int numTrainEpochs = 3, double learningRate = 5e-5, IDataView? validationSet = null) => FineTune(new FineTuneOptions
        {
            Model = model,
            LabelColumnName = labelColumnName,
            InputColumnName = inputColumnName,
            OutputColumnName = outputColumnName,
            MaxLength = maxLength,
            Training = new TrainingOptions { NumTrainEpochs = numTrainEpochs, LearningRate = learningRate },
            ValidationSet = validationSet,
        });

    /// <summary>Fine-tunes a checkpoint, or trains a new model.</summary>
    /// <param name="options">Copied: later changes have no effect.</param>
    /// <exception cref="ArgumentException">A value is outside its range, or not exactly one of <see cref="FineTuneOptions.Model"/> and <see cref="FineTuneOptions.Config"/> is given.</exception>
    public MiniSeqEstimator FineTune(FineTuneOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        return new MiniSeqEstimator(_context, options);
    }

    /// <summary>A checkpoint as it is, without training: to write texts, to be evaluated, or as a step of a pipeline.</summary>
    /// <param name="model">Folder with config.json, model.safetensors and tokenizer.json.</param>
    /// <param name="adapter">Folder of a PEFT adapter for it, with adapter_config.json and adapter_model.safetensors; null uses none.</param>
    /// <param name="inputColumnName">The document.</param>
    /// <param name="outputColumnName">Gets the generated text.</param>
    /// <param name="promptTemplate">Text around the document, with <c>{input}</c> once.</param>
    /// <param name="maxLength">The most tokens of a prompt and what is written after it; null takes the model's.</param>
    /// <param name="labelColumnName">The text wanted, for <see cref="Evaluate"/>; null evaluates on the input text itself.</param>
    /// <exception cref="ArgumentException">A value is outside its range.</exception>
    /// <exception cref="FileNotFoundException">A folder lacks a file.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, or the adapter is another model's.</exception>
    /// <exception cref="NotSupportedException">An architecture or setting that this library does not compute.</exception>
    public MiniSeqTransformer LoadPretrained(string model, string? adapter = null, string inputColumnName = "Document", string outputColumnName = "GeneratedText",
        string promptTemplate = DocumentEncoder.InputPlaceholder, int? maxLength = null, string? labelColumnName = null) => LoadPretrained(new PretrainedOptions
        {
            Model = model,
            Adapter = adapter,
            InputColumnName = inputColumnName,
            OutputColumnName = outputColumnName,
            PromptTemplate = promptTemplate,
            MaxLength = maxLength,
            LabelColumnName = labelColumnName,
        });

    /// <summary>The same with all options.</summary>
    /// <param name="options">Read now: later changes have no effect.</param>
    /// <exception cref="ArgumentException">A value is outside its range.</exception>
    /// <exception cref="FileNotFoundException">A folder lacks a file.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, or the adapter is another model's.</exception>
    /// <exception cref="NotSupportedException">An architecture or setting that this library does not compute.</exception>
    public MiniSeqTransformer LoadPretrained(PretrainedOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        var host = ((IHostEnvironment)_context).Register(nameof(MiniSeqTransformer));
        using var channel = host.Start("Loading");
        return new MiniSeqTransformer(_context, SessionStart.Open(options.Checked(), options.Adapter, host.Rand.Next(), ComputeDevice.Of(_context), channel), options.WeightsFolder);
    }

    /// <summary>The model in a fitted or loaded pipeline, for single texts, evaluation and scoring in batches.</summary>
    /// <param name="loaded">A <see cref="MiniSeqTransformer"/>, what <c>mlContext.Model.Load</c> gave, or a chain with one of these in it.</param>
    /// <returns>The fitted transformer itself, or one that shares the weights of the loaded pipeline: disposing it frees them, and the
    /// pipeline reads them anew when next used.</returns>
    /// <exception cref="ArgumentException">There is no MiniSeq model in it.</exception>
    /// <exception cref="FileNotFoundException">The weights beside the saved model are not found.</exception>
    /// <exception cref="InvalidDataException">They are not those it was saved with.</exception>
    public MiniSeqTransformer FromModel(ITransformer loaded)
    {
        ArgumentNullException.ThrowIfNull(loaded);
        return SavedPipeline.Find(_context, loaded)
            ?? throw new ArgumentException("There is no MiniSeq model in this transformer.", nameof(loaded));
    }

    /// <summary>Loss, perplexity and accuracy of a model on the rows of a data view. Rows with an empty text, or a label that does not fit, are skipped.</summary>
    /// <param name="data">Has the model's input column, and its label column if it was trained with one: what the pipeline's <c>Transform</c> gives will do, and no text is generated for it.</param>
    /// <param name="model">Anything that <see cref="FromModel"/> takes.</param>
    /// <param name="labelColumnName">Null takes the one of the training.</param>
    /// <param name="inputColumnName">Null takes the one of the training.</param>
    /// <exception cref="ArgumentException">A column is missing or holds no text, or there is no row to evaluate on.</exception>
    public CausalLMMetrics Evaluate(IDataView data, ITransformer model, string? labelColumnName = null, string? inputColumnName = null)
    {
        ArgumentNullException.ThrowIfNull(data);
        return FromModel(model).Evaluate(data, labelColumnName, inputColumnName);
    }

    /// <summary>
    /// <c>mlContext.Model.Save</c> with the folders of weights beside the file, wherever that is: moved together they are found again.
    /// </summary>
    /// <param name="model">A pipeline with any number of fitted MiniSeq models.</param>
    /// <param name="inputSchema">As for <c>mlContext.Model.Save</c>.</param>
    /// <param name="filePath">The zip file. A relative <see cref="FineTuneOptions.WeightsFolder"/> is relative to its folder.</param>
    public void Save(ITransformer model, DataViewSchema? inputSchema, string filePath)
    {
        using var place = ModelPlace.Enter(filePath);
        // ML.NET writes into the file itself: what is there already would be gone with a save that fails.
        string temporary = $"{filePath}.{Guid.NewGuid():N}.tmp";
        try
        {
            _context.Model.Save(model, inputSchema, temporary);
            File.Move(temporary, filePath, overwrite: true);
        }
        finally
        {
            File.Delete(temporary);
        }
    }

    /// <summary><c>mlContext.Model.Load</c> that looks for the folders of weights beside the file first, on every system.</summary>
    /// <param name="filePath">The zip file.</param>
    /// <param name="inputSchema">As from <c>mlContext.Model.Load</c>.</param>
    public ITransformer Load(string filePath, out DataViewSchema inputSchema)
    {
        using var place = ModelPlace.Enter(filePath);
        return _context.Model.Load(filePath, out inputSchema);
    }
}
