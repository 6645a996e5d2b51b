namespace MiniSeq.Models;

/// <summary>A stretch of a rendered dialogue.</summary>
/// <param name="Text">As it is rendered.</param>
/// <param name="IsToken">Whether it is one special token, or text.</param>
/// <param name="IsAnswer">Whether the assistant writes it: what follows the generation prompt, with the token that ends the turn.</param>
internal readonly record struct ChatPart(string Text, bool IsToken = false, bool IsAnswer = false);

/// <summary>The published chat template of a family, written as code.</summary>
/// <param name="Tokens">The special tokens it is made of.</param>
/// <param name="EndOfTurn">The one that ends an answer.</param>
/// <param name="Alternates">Whether user and assistant must take turns, the user first.</param>
/// <param name="Parts">Renders checked messages; the flag adds the generation prompt. Between two tokens an answer comes last.</param>
internal sealed record ChatFormat(string[] Tokens, string EndOfTurn, bool Alternates, Func<IReadOnlyList<ChatMessage>, bool, IEnumerable<ChatPart>> Parts)
{
    /// <summary>Text that marks the turns and has no token of its own: a message must not hold it.</summary>
    public string[] TextMarks { get; init; } = [];

    /// <summary>Whether there is a place for a system message.</summary>
    public bool HasSystem { get; init; } = true;

    /// <exception cref="ArgumentOutOfRangeException">There is no such kind.</exception>
    public static ChatFormat Of(ChatTemplateKind kind) => kind switch
    {
        ChatTemplateKind.Llama3 => new(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", false, Llama3),
        ChatTemplateKind.ChatMl => new(["<|im_start|>", "<|im_end|>"], "<|im_end|>", false, ChatMl),
        ChatTemplateKind.Mistral => new(["<s>", "</s>", "[INST]", "[/INST]"], "</s>", true, Mistral),
        ChatTemplateKind.Gemma => new(["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", true, Gemma) { HasSystem = false },
        ChatTemplateKind.Llama2 => new(["<s>", "</s>"], "</s>", true, Llama2) { TextMarks = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"] },
        _ => throw new ArgumentOutOfRangeException(nameof(kind), kind, "There is no such chat template."),
    };

    // meta-llama/Meta-Llama-3-8B-Instruct; 3.1 and later differ in a preamble with dates in the system message.
    private static IEnumerable<ChatPart> Llama3(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        yield return Token("<|begin_of_text|>");
        foreach (var message in messages)
        {
            foreach (var part in Header(message.Role)) yield return part;
            yield return Content(message, message.Content.Trim());
            yield return End("<|eot_id|>", message);
        }
        if (addGenerationPrompt)
            foreach (var part in Header(ChatMessage.Assistant)) yield return part;

        static ChatPart[] Header(string role) => [Token("<|start_header_id|>"), new(role), Token("<|end_header_id|>"), new("\n\n")];
    }

    // The ChatML of Qwen without tools and thinking, and without a default system message.
    private static IEnumerable<ChatPart> ChatMl(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        foreach (var message in messages)
        {
            yield return Token("<|im_start|>");
            yield return new(message.Role + "\n");
            yield return Content(message, message.Content);
            yield return End("<|im_end|>", message);
            yield return new("\n");
        }
        if (!addGenerationPrompt) yield break;
        yield return Token("<|im_start|>");
        yield return new("assistant\n");
    }

    // google/gemma-7b-it and gemma-2-9b-it.
    private static IEnumerable<ChatPart> Gemma(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        yield return Token("<bos>");
        foreach (var message in messages)
        {
            yield return Token("<start_of_turn>");
            yield return new(message.Role == ChatMessage.Assistant ? "model\n" : "user\n");
            yield return Content(message, message.Content.Trim());
            yield return End("<end_of_turn>", message);
            yield return new("\n");
        }
        if (!addGenerationPrompt) yield break;
        yield return Token("<start_of_turn>");
        yield return new("model\n");
    }

    // mistralai/Mistral-7B-Instruct-v0.3. Its template puts the system text before the last user message, and only where that ends the
    // dialogue; mistral-common puts it there in finished dialogues too, and so does this.
    private static IEnumerable<ChatPart> Mistral(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        var (system, turns) = SplitSystem(messages);
        int lastUser = (turns.Count - 1) / 2 * 2; // the user speaks first, and at every second turn
        yield return Token("<s>");
        for (int i = 0; i < turns.Count; i++)
            if (turns[i].Role == ChatMessage.User)
            {
                yield return Token("[INST]");
                yield return new(i == lastUser && system is not null ? $" {system}\n\n{turns[i].Content}" : $" {turns[i].Content}");
                yield return Token("[/INST]");
            }
            else
            {
                yield return Content(turns[i], $" {turns[i].Content.Trim()}");
                yield return End("</s>", turns[i]);
            }
    }

    // meta-llama/Llama-2-7b-chat-hf.
    private static IEnumerable<ChatPart> Llama2(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        var (system, turns) = SplitSystem(messages);
        for (int i = 0; i < turns.Count; i++)
            if (turns[i].Role == ChatMessage.User)
            {
                string content = i == 0 && system is not null ? $"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[i].Content}" : turns[i].Content;
                yield return Token("<s>");
                yield return new($"[INST] {content.Trim()} [/INST]");
            }
            else
            {
                yield return Content(turns[i], $" {turns[i].Content.Trim()} ");
                yield return End("</s>", turns[i]);
            }
    }

    private static (string? System, IReadOnlyList<ChatMessage> Turns) SplitSystem(IReadOnlyList<ChatMessage> messages) =>
        messages[0].Role == ChatMessage.System ? (messages[0].Content, [.. messages.Skip(1)]) : (null, messages);

    private static ChatPart Token(string text) => new(text, IsToken: true);

    private static ChatPart Content(ChatMessage message, string text) => new(text, IsAnswer: message.Role == ChatMessage.Assistant);

    private static ChatPart End(string token, ChatMessage message) => new(token, IsToken: true, IsAnswer: message.Role == ChatMessage.Assistant);
}
