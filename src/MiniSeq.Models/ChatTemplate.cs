namespace MiniSeq.Models;

/// <summary>The families' own ways to write a dialogue as one text.</summary>
public enum ChatTemplateKind
{
    /// <summary>Llama 3: <c>&lt;|start_header_id|&gt;user&lt;|end_header_id|&gt;</c>, two line feeds, content, <c>&lt;|eot_id|&gt;</c>. From 3.1 on,
    /// Meta's template also begins the system message with "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"; here that is
    /// added by whoever wants it, in the system message.</summary>
    Llama3,

    /// <summary>ChatML, of Qwen and many others: <c>&lt;|im_start|&gt;user</c>, a line feed, content, <c>&lt;|im_end|&gt;</c>. No system message is made
    /// up where the dialogue has none (Qwen2.5's own template does), and no thinking block is added to answers (Qwen3's own does).</summary>
    ChatMl,

    /// <summary>Mistral 7B Instruct v0.3 and its kin, where <c>[INST]</c> and <c>[/INST]</c> are tokens: <c>[INST] content[/INST] answer&lt;/s&gt;</c>, the
    /// system text before the last user message. Not v0.1 and v0.2, which have no such tokens, and not the tekken models, which have other spaces.</summary>
    Mistral,

    /// <summary>Gemma: <c>&lt;start_of_turn&gt;user</c>, a line feed, content, <c>&lt;end_of_turn&gt;</c>; the assistant is called model, and there is no
    /// system message (Gemma 3 puts its text at the beginning of the first user message).</summary>
    Gemma,

    /// <summary>Llama 2: <c>&lt;s&gt;[INST] content [/INST] answer &lt;/s&gt;</c>, the system text in <c>&lt;&lt;SYS&gt;&gt;</c> in the first user message. These marks
    /// are ordinary text, so a message that holds one is refused, as Meta's own code does.</summary>
    Llama2,
}

/// <summary>A dialogue as tokens.</summary>
/// <param name="InputIds">The tokens.</param>
/// <param name="AssistantMasks">For each of them whether the assistant writes it: its answers with the token that ends each (Hugging Face's <c>assistant_masks</c>).</param>
public sealed record ChatTokens(int[] InputIds, bool[] AssistantMasks);

/// <summary>Writes dialogues the way a family of models was trained to read them.</summary>
/// <remarks>
/// The tokens are those of the rendered text, save that special tokens come from the template alone: <c>&lt;|eot_id|&gt;</c> typed in a
/// message is ordinary text. Added tokens that the tokenizer does not call special, such as Qwen's <c>&lt;think&gt;</c>, stay tokens. Llama 3, Gemma and Llama 2 take the white space around a message away; Mistral around an answer. May be used
/// from several threads.
/// </remarks>
public sealed class ChatTemplate
{
    private readonly ChatFormat _format;
    private readonly Dictionary<string, int> _tokens;
    private readonly AddedTokenSet _ordinary;

    /// <summary>A family's template for a tokenizer.</summary>
    /// <exception cref="ArgumentException">The tokenizer lacks a special token of the template.</exception>
    /// <exception cref="ArgumentOutOfRangeException">There is no such kind.</exception>
    public ChatTemplate(HuggingFaceTokenizer tokenizer, ChatTemplateKind kind)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        (Tokenizer, Kind, _format) = (tokenizer, kind, ChatFormat.Of(kind));
        string[] missing = Missing(tokenizer, kind);
        if (missing.Length > 0)
            throw new ArgumentException($"The tokenizer has no token {string.Join(", ", missing)}, which the chat template {kind} is made of: take the template the model was trained with.", nameof(kind));
        _tokens = _format.Tokens.ToDictionary(token => token, token => tokenizer.TokenToId(token)!.Value);
        _ordinary = tokenizer.WithoutSpecialTokens(_tokens.Values.ToHashSet());
    }

    /// <summary>Whose template it is.</summary>
    public ChatTemplateKind Kind { get; }

    /// <summary>The tokenizer of the model.</summary>
    public HuggingFaceTokenizer Tokenizer { get; }

    /// <summary>The token that ends an answer.</summary>
    public int EndOfTurnTokenId => _tokens[_format.EndOfTurn];

    /// <summary>The template a model was trained with: by its <c>chat_template</c>, or else by the special tokens of its vocabulary.</summary>
    /// <returns>Null where none of them fits.</returns>
    public static ChatTemplateKind? Detect(HuggingFaceTokenizer tokenizer)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        var kind = tokenizer.ChatTemplateText is { } template ? Recognize(template) : Guess(tokenizer);
        return kind is { } found && Missing(tokenizer, found).Length == 0 ? kind : null;
    }

    /// <summary>The dialogue as one text.</summary>
    /// <param name="messages">From the first turn on.</param>
    /// <param name="addGenerationPrompt">Whether the text ends where an answer begins.</param>
    /// <exception cref="ArgumentException">No message, an unknown role, roles in an order that the template does not know, or a message with a mark of Llama 2's template.</exception>
    public string Render(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt = false) =>
        string.Concat(Parts(messages, addGenerationPrompt).Select(part => part.Text));

    /// <summary>The tokens of the dialogue.</summary>
    /// <param name="messages">From the first turn on.</param>
    /// <param name="addGenerationPrompt">Whether the tokens end where an answer begins.</param>
    /// <exception cref="ArgumentException">As for <see cref="Render"/>.</exception>
    public ChatTokens Encode(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt = false)
    {
        var ids = new List<int>();
        var masks = new List<bool>();
        var (text, answer) = ("", "");
        foreach (var part in Parts(messages, addGenerationPrompt).Append(new ChatPart("", IsToken: true)))
            if (part.IsToken)
            {
                // Everything between two special tokens in one piece, as in the rendered text: tokens may reach across the template's own text.
                AddSection(text, answer, ids, masks);
                (text, answer) = ("", "");
                if (part.Text.Length == 0) break;
                ids.Add(_tokens[part.Text]);
                masks.Add(part.IsAnswer);
            }
            else if (part.IsAnswer) answer += part.Text;
            else text += part.Text;
        return new ChatTokens([.. ids], [.. masks]);
    }

    /// <summary>The ids of a message's content by itself, special tokens in it as ordinary text.</summary>
    public IReadOnlyList<int> EncodeContent(string content)
    {
        ArgumentNullException.ThrowIfNull(content);
        return EncodeText(content, first: true);
    }

    // The answer begins with the token that holds its first byte: one that reaches across from the template's own text is learned.
    private void AddSection(string text, string answer, List<int> ids, List<bool> masks)
    {
        var section = EncodeText(text + answer, first: ids.Count == 0);
        int begin = section.Count;
        if (answer.Length > 0)
        {
            int bytes = EncodeText(text, first: ids.Count == 0).Sum(Size);
            begin = section.TakeWhile(id => (bytes -= Size(id)) >= 0).Count();
        }
        ids.AddRange(section);
        masks.AddRange(section.Select((_, i) => i >= begin));
    }

    private int Size(int id) => Tokenizer.Bytes(id, skipSpecialTokens: false).Length;

    private List<int> EncodeText(string text, bool first)
    {
        var ids = new List<int>(text.Length / 3);
        Tokenizer.EncodeText(text, first, _ordinary, ids);
        return ids;
    }

    private IEnumerable<ChatPart> Parts(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        ArgumentNullException.ThrowIfNull(messages);
        Check(messages, addGenerationPrompt);
        return _format.Parts(messages, addGenerationPrompt);
    }

    private void Check(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        if (messages.Count == 0) throw new ArgumentException("A dialogue needs at least one message.", nameof(messages));
        for (int i = 0; i < messages.Count; i++)
        {
            var (role, content) = messages[i];
            if (role is not (ChatMessage.System or ChatMessage.User or ChatMessage.Assistant))
                throw new ArgumentException($"Message {i} has the role '{role}'; the roles are system, user and assistant.", nameof(messages));
            if (role == ChatMessage.System && !_format.HasSystem)
                throw new ArgumentException($"Message {i} has the role 'system', which the chat template {Kind} does not know: put its text at the beginning of the first user message.", nameof(messages));
            if (_format.TextMarks.FirstOrDefault(mark => content.Contains(mark, StringComparison.Ordinal)) is { } found)
                throw new ArgumentException($"Message {i} holds '{found}', with which the chat template {Kind} marks the turns.", nameof(messages));
        }
        if (_format.Alternates) CheckOrder([.. messages.Select(message => message.Role), .. addGenerationPrompt ? new[] { ChatMessage.Assistant } : []]);
    }

    private void CheckOrder(string[] roles)
    {
        int first = roles[0] == ChatMessage.System ? 1 : 0;
        for (int i = first; i < Math.Max(roles.Length, first + 1); i++)
        {
            string wanted = (i - first) % 2 == 0 ? ChatMessage.User : ChatMessage.Assistant;
            if (roles.ElementAtOrDefault(i) is var role && role != wanted)
                throw new ArgumentException($"Message {i} should be the {wanted}'s and is {(role is null ? "missing" : $"the {role}'s")}: in the chat template {Kind} user and assistant take turns, the user first{(_format.HasSystem ? ", after a system message if there is one" : "")}.", nameof(roles));
        }
    }

    private static string[] Missing(HuggingFaceTokenizer tokenizer, ChatTemplateKind kind) =>
        [.. ChatFormat.Of(kind).Tokens.Where(token => tokenizer.TokenToId(token) is null)];

    // What tells each family's Jinja program from its relatives': Phi's ChatML has im_sep, Mistral's versions differ in spaces around [INST].
    private static ChatTemplateKind? Recognize(string template)
    {
        bool Has(string text) => template.Contains(text, StringComparison.Ordinal);
        if (Has("<|start_header_id|>")) return ChatTemplateKind.Llama3;
        if (Has("<|im_start|>")) return Has("<|im_sep|>") ? null : ChatTemplateKind.ChatMl;
        if (Has("<start_of_turn>")) return ChatTemplateKind.Gemma;
        if (Has("<<SYS>>")) return ChatTemplateKind.Llama2;
        return Has("[INST] ") && !Has(" [/INST]") ? ChatTemplateKind.Mistral : null;
    }

    // Llama 2 has no token that others have not, and tekken's [INST] is of byte-level tokenizers.
    private static ChatTemplateKind? Guess(HuggingFaceTokenizer tokenizer)
    {
        ChatTemplateKind[] kinds = [ChatTemplateKind.Llama3, ChatTemplateKind.ChatMl, ChatTemplateKind.Gemma, .. tokenizer.Decoder.ByteLevel ? Array.Empty<ChatTemplateKind>() : [ChatTemplateKind.Mistral]];
        return kinds.Where(kind => Missing(tokenizer, kind).Length == 0).Select(kind => (ChatTemplateKind?)kind).FirstOrDefault();
    }
}
